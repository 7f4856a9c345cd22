"""serve: answer over HTTP from the registry.

python jobs/serve.py --model models:/mmlm-demo@champion --port 8000
"""

import sys

from mmlm.cli import main
from mmlm.leaving import run

if __name__ == "__main__":
    run(lambda: main(["serve", *sys.argv[1:]]))
