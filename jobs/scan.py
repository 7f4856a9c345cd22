"""scan: read the raw corpora of a story into its manifest.

python jobs/scan.py demo --out runs/demo
ray job submit --address http://HOST:8265 -- $PWD/.venv/bin/python $PWD/jobs/scan.py demo --out $PWD/runs/demo --inside-ray
"""

import sys

from mmlm.cli import main
from mmlm.launch.leader import lead

if __name__ == "__main__":
    sys.exit(lead(lambda: main(["scan", *sys.argv[1:]])))
