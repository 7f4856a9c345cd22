"""train: train a story's fused Transformer, with DeepSpeed on all ranks.

python jobs/train.py demo --out runs/demo
torchrun --nproc-per-node 2 -- jobs/train.py demo --out runs/demo
python jobs/train.py demo --out runs/demo --on ray --address http://HOST:8265   # as a job of a Ray cluster
"""

import sys

from mmlm.cli import main
from mmlm.leaving import run

if __name__ == "__main__":
    run(lambda: main(["train", *sys.argv[1:]]))
