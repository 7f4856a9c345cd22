"""Watchdog: a training that does not come forward is ended with a stack dump of every rank, never left hanging.

Each rank has its own thread. Ranks wait for each other in every step, so when one hangs all do; each writes the stacks of
its threads to `logs/rank-N.stacks`, waits for the others to do so, and ends. Where the hang holds the interpreter's
lock, no thread of Python runs: faulthandler's own timer (written in C) dumps and ends the process a little later.
"""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from pathlib import Path
from typing import TextIO

from mmlm.errors import WorkLost
from mmlm.launch.local import again
from mmlm.progress import tell
from mmlm.storage import write_json
from mmlm.world import World

START_STEPS = 12
"""How many times as long as a step the start may take until it comes to the next part: ranks meet, a plan of packing reads
the length of every record (60,000 a second where shards lie here), the model is tried out and built. Six hours by default."""
GRACE = 3.0
"""Seconds between a rank's dump and its end, for the other ranks to write theirs."""


class Watchdog:
    """`with Watchdog(...) as dog: dog.beat("step 7")`; no beat for `seconds` ends the process with code 4.

    What is known to take long may: it is given twice the time that it is expected to take, where that is more. What comes
    before the first beat is given `start` seconds, where that is more.
    """

    def __init__(self, seconds: float, logs: Path, world: World, name: str, start: float = 0.0) -> None:
        self.seconds, self.logs, self.world, self.name, self.start = seconds, logs, world, name, start
        self.what = "its start"
        self._limit, self._due, self._armed = seconds, time.monotonic() + seconds, 0.0
        self._ended = threading.Event()
        self._file: TextIO | None = None

    def __enter__(self) -> Watchdog:
        if self.seconds > 0:
            self.logs.mkdir(parents=True, exist_ok=True)
            self._file = self._path(self.world.rank).open("w")
            threading.Thread(target=self._watch, name="mmlm-watchdog", daemon=True).start()
            self.beat(self.what, self.start / 2)  # which is what it may be expected to take
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._file is not None:
            faulthandler.cancel_dump_traceback_later()
            self._file.close()
            if not self._dumped(self.world.rank):
                self._path(self.world.rank).unlink(missing_ok=True)

    @classmethod
    def of_start(cls, seconds: float, logs: Path, world: World, name: str) -> Watchdog:
        """One whose first beat comes when ranks have met and batches are planned: START_STEPS times as patient till then."""
        return cls(seconds, logs, world, name, START_STEPS * seconds)

    def _path(self, rank: int) -> Path:
        return self.logs / f"rank-{rank}.stacks"

    def _dumped(self, rank: int) -> bool:
        return self._path(rank).exists() and self._path(rank).stat().st_size > 0

    def beat(self, what: str, expected: float = 0.0) -> None:
        """Training has come to `what`, which is expected to take so many seconds."""
        now, before = time.monotonic(), self._limit
        limit = max(self.seconds, 2 * expected)
        self.what, self._limit, self._due = what, limit, now + limit
        if self._file is not None and (limit != before or now - self._armed > self.seconds / 10):
            self._armed = now
            faulthandler.dump_traceback_later(1.2 * limit + 2 * GRACE, exit=True, file=self._file)

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self.seconds / 4)):
            if time.monotonic() > self._due:
                self._end()

    def _end(self) -> None:
        """Dump, leave word for the launcher, end the process."""
        file = self._file
        assert file is not None
        faulthandler.dump_traceback(file, all_threads=True)
        file.flush()
        time.sleep(GRACE)
        if self._ended.is_set() or time.monotonic() < self._due:
            return  # it came forward after all
        silent = [rank for rank in range(self.world.size) if not self._dumped(rank)]
        error = WorkLost(
            f"{self.name} hangs: nothing came forward for {self._limit:g} s in {self.what}"
            + (f", and rank {silent[0]} does not even answer" if silent else ""),
            wanted=f"a step within {self._limit:g} s (--hang)",
            cure=f"the stacks of all ranks are in {self.logs}/rank-*.stacks; {again(self.logs)}",
        )
        tell(f"mmlm: {error}" if self.world.is_main else f"rank {self.world.rank}: {error}")
        kind = f"{WorkLost.__module__}:{WorkLost.__qualname__}"
        said = {"kind": kind, "found": error.found, "wanted": error.wanted, "cure": error.cure, "exit": error.exit_code}
        write_json(self.logs / f"rank-{self.world.rank}.error.json", said)
        os._exit(error.exit_code)
