"""evaluate: score a story's models and write the report.

python jobs/evaluate.py demo --out runs/demo
ray job submit --address http://HOST:8265 -- $PWD/.venv/bin/python $PWD/jobs/evaluate.py demo --out $PWD/runs/demo --inside-ray
"""

import sys

from mmlm.cli import main
from mmlm.launch.leader import lead

if __name__ == "__main__":
    sys.exit(lead(lambda: main(["evaluate", *sys.argv[1:]])))
