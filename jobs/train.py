"""train: train a story's fused Transformer, with DeepSpeed on all ranks.

python jobs/train.py demo --out runs/demo
torchrun --nproc-per-node 2 -- jobs/train.py demo --out runs/demo
ray job submit --address http://HOST:8265 -- $PWD/.venv/bin/python $PWD/jobs/train.py demo --out $PWD/runs/demo --inside-ray
"""

import sys

from mmlm.cli import main
from mmlm.launch.leader import lead

if __name__ == "__main__":
    sys.exit(lead(lambda: main(["train", *sys.argv[1:]])))
