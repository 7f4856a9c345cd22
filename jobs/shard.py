"""shard: turn a story's manifest into feature shards, with Ray.

python jobs/shard.py demo --out runs/demo
ray job submit --address http://HOST:8265 -- $PWD/.venv/bin/python $PWD/jobs/shard.py demo --out $PWD/runs/demo --inside-ray
"""

import sys

from mmlm.cli import main
from mmlm.launch.leader import lead

if __name__ == "__main__":
    sys.exit(lead(lambda: main(["shard", *sys.argv[1:]])))
