"""evaluate: score a story's models and write the report.

python jobs/evaluate.py demo --out runs/demo
python jobs/evaluate.py demo --out runs/demo --on ray --address http://HOST:8265   # as a job of a Ray cluster
"""

import sys

from mmlm.cli import main
from mmlm.leaving import run

if __name__ == "__main__":
    run(lambda: main(["evaluate", *sys.argv[1:]]))
