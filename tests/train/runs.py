"""Trainings in processes of their own that can be watched and struck."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmlm import artifacts
from mmlm.artifacts import Artifact
from mmlm.train import checkpoint
from tests.faults.stage import ROOT, wait_for

SMALL: dict[str, Any] = {
    "steps": 40,
    "save_every": 4,
    "keep": 2,
    "log_every": 1,
    "model": {"width": 32, "layers": 1, "heads": 2, "attention": "prefix"},
    "data": {"batch": 12},
}


class Training:
    """`tests.train.driver` at work on `out`, in a session of its own."""

    def __init__(
        self, shards: Artifact, out: Path, ranks: int, config: dict[str, Any], uri: str = "", **env: str
    ) -> None:
        out.parent.mkdir(parents=True, exist_ok=True)
        self.out = out
        self.before = self._attempts()
        self.said = out.parent / f"{out.name}-{time.time_ns()}.txt"
        environment = {
            **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MMLM_LEDGER": "1", **env,
        }  # fmt: skip
        command = [str(shards.path), str(out), str(ranks), json.dumps(config), uri]
        with self.said.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.train.driver", *command],
                env=environment, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True,
            )  # fmt: skip

    def ranks(self) -> list[int]:
        """Process ids of the ranks, in no order."""
        pid, found = self.process.pid, []
        with contextlib.suppress(OSError):
            for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
                if b"mmlm.launch.rank" in Path(f"/proc/{child}/cmdline").read_bytes():
                    found.append(int(child))
        return found

    def step(self) -> int:
        """The last step, from 0, in the ledger of the present attempt; -1 before the first."""
        with contextlib.suppress(OSError, ValueError, IndexError):
            row = json.loads((self.out / "ledger" / "rank-0.jsonl").read_text().splitlines()[-1])
            return int(row["step"]) if row["attempt"] > self.before else -1
        return -1

    def _attempts(self) -> int:
        try:
            return len((self.out / "ledger" / "attempts.jsonl").read_text().splitlines())
        except OSError:
            return 0

    def until(self, what: str, true: Callable[[], object]) -> None:
        wait_for(what, lambda: true() or self.process.poll() is not None, 240, self.words)

    def words(self) -> str:
        return self.said.read_text(errors="replace")

    def end(self) -> int:
        """The exit code."""
        try:
            return self.process.wait(300)
        finally:
            self.kill()

    def kill(self) -> None:
        """Nothing of it is left."""
        pids = [*self.ranks(), self.process.pid]
        with contextlib.suppress(OSError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)
        wait_for("all gone", lambda: not any(_alive(pid) for pid in pids), 30)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def stopped(trained: Artifact, out: Path, step: int) -> Path:
    """A copy of a finished training at `out`, as it lay there when it had been killed after saving `step`."""
    shutil.copytree(trained.path, out, dirs_exist_ok=True)
    (out / artifacts.NAME).unlink()
    for later in checkpoint.steps(out / "checkpoints"):
        if later > step:
            shutil.rmtree(out / "checkpoints" / checkpoint.name_of(later))
    (out / artifacts.WORK).write_text(json.dumps({"fingerprint": trained.fingerprint}))
    return out


def saved(out: Path) -> int:
    """The step of the newest checkpoint that is there, intact or not."""
    return max(checkpoint.steps(out / "checkpoints"), default=0)


def losses(out: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["metrics"]["loss"] for row in rows if "loss" in row["metrics"]}
