"""distill: teach a story's student from its teacher.

python jobs/distill.py demo --out runs/demo
torchrun --nproc-per-node 2 -- jobs/distill.py demo --out runs/demo
python jobs/distill.py demo --out runs/demo --on ray --address http://HOST:8265   # as a job of a Ray cluster
"""

import sys

from mmlm.cli import main
from mmlm.leaving import run

if __name__ == "__main__":
    run(lambda: main(["distill", *sys.argv[1:]]))
