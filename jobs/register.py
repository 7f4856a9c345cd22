"""register: publish a story's model and let the gate decide about the champion.

python jobs/register.py demo --out runs/demo
python jobs/register.py demo --out runs/demo --on ray --address http://HOST:8265   # as a job of a Ray cluster
"""

import sys

from mmlm.cli import main
from mmlm.leaving import run

if __name__ == "__main__":
    run(lambda: main(["register", *sys.argv[1:]]))
