"""shard: turn a story's manifest into feature shards, with Ray.

python jobs/shard.py demo --out runs/demo
python jobs/shard.py demo --out runs/demo --on ray --address http://HOST:8265   # as a job of a Ray cluster
"""

import sys

from mmlm.cli import main
from mmlm.leaving import run

if __name__ == "__main__":
    run(lambda: main(["shard", *sys.argv[1:]]))
