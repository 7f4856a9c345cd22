"""scan: read the raw corpora of a story into its manifest.

python jobs/scan.py demo --out runs/demo
python jobs/scan.py demo --out runs/demo --on ray --address http://HOST:8265   # as a job of a Ray cluster
"""

import sys

from mmlm.cli import main
from mmlm.leaving import run

if __name__ == "__main__":
    run(lambda: main(["scan", *sys.argv[1:]]))
