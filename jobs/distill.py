"""distill: teach a story's student from its teacher.

python jobs/distill.py demo --out runs/demo
torchrun --nproc-per-node 2 -- jobs/distill.py demo --out runs/demo
ray job submit --address http://HOST:8265 -- $PWD/.venv/bin/python $PWD/jobs/distill.py demo --out $PWD/runs/demo --inside-ray
"""

import sys

from mmlm.cli import main
from mmlm.launch.leader import lead

if __name__ == "__main__":
    sys.exit(lead(lambda: main(["distill", *sys.argv[1:]])))
