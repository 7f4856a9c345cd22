"""The verb `shard` as a process of its own, guarded as the command guards it: the same exit codes, the same sentences.

python -m tests.faults.driver MANIFEST DATA OUT RAY_FROM WORKERS [ADDRESS]
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from mmlm import artifacts, cli
from mmlm.progress import Progress
from mmlm.shards.shard import shard
from mmlm.world import apply_quiet_environment
from tests.faults.corpus import config


def main(manifest: str, data: str, out: str, ray_from: str, workers: str, address: str = "") -> int:
    def verb(_: argparse.Namespace) -> int:
        shard(
            config(int(ray_from)), artifacts.read(manifest), data=data, out=Path(out), workers=int(workers),
            ray_address=address or None,
        )  # fmt: skip
        return 0

    apply_quiet_environment()
    Progress.quiet = True
    signal.signal(signal.SIGTERM, cli._stop)
    return cli._guarded(argparse.Namespace(command=verb, debug=False))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
