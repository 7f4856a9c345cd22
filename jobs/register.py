"""register: publish a story's model and let the gate decide about the champion.

python jobs/register.py demo --out runs/demo
python jobs/register.py demo --out runs/demo --on ray --address http://HOST:8265   # as a job of a Ray cluster
"""

import sys

from mmlm.cli import main

if __name__ == "__main__":
    sys.exit(main(["register", *sys.argv[1:]]))
