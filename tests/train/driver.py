"""The verb `train` as a process of its own, guarded as the command guards it.

python -m tests.train.driver SHARDS OUT RANKS CONFIG [TRACKING_URI]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
from pathlib import Path
from typing import Any

from mmlm import artifacts, cli
from mmlm.config import parse
from mmlm.launch.local import ranks
from mmlm.tracking import NullTracker, Tracker
from mmlm.train.config import TrainConfig
from mmlm.train.train import train
from mmlm.world import apply_quiet_environment


def main(shards: str, out: str, count: str, config: str, uri: str = "") -> int:
    def verb(_: argparse.Namespace) -> int:
        settings = parse(TrainConfig, json.loads(config), "test")
        tracker: Any = Tracker.start(uri, story="faults", out=Path(out).parent) if uri else NullTracker()
        with contextlib.closing(tracker) if not uri else tracker:
            train(settings, artifacts.read(shards), out=Path(out), launch=ranks(int(count)), tracker=tracker)
        return 0

    apply_quiet_environment()
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, cli._stop)
    return cli._guarded(argparse.Namespace(command=verb, debug=False))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
