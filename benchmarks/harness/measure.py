"""Runs contestants side by side and makes rows of what they did."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness.environments import PeerUnavailable, home, interpreter
from benchmarks.peers.clock import TAG

PROJECT = Path(__file__).parents[2]
ONE_THREAD = {
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"), "1"),
    "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "VIPS_CONCURRENCY": "1", "ARROW_NUM_THREADS": "1",
}  # fmt: skip
"""Every pool of threads has one thread; OpenCV's is set where it is used. The processes have one core anyway."""
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
    "LITDATA_DISABLE_VERSION_CHECK": "1", "NO_ALBUMENTATIONS_UPDATE": "1", "PYTHONWARNINGS": "ignore",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "PYTHONDONTWRITEBYTECODE": "1",
}  # fmt: skip
LIMIT = 1800
"""Seconds that one run of a contestant may take."""


@dataclass(frozen=True)
class Contestant:
    """`script` is a module of benchmarks.ours, or of benchmarks.peers, which `environment` then runs."""

    name: str
    script: str
    options: Mapping[str, Any] = field(default_factory=dict)
    environment: str | None = None

    def command(self) -> list[str]:
        """Raises PeerUnavailable."""
        if self.environment is None:
            return [sys.executable, "-m", f"benchmarks.ours.{self.script}"]
        return [interpreter(self.environment), str(PROJECT / "benchmarks" / "peers" / f"{self.script}.py")]


@dataclass(frozen=True)
class Measured:
    """One timed run: what the contestant told, and its laps."""

    result: dict[str, Any]

    def seconds(self, laps: Sequence[str], clock: str) -> float:
        """By `wall` or by `cpu`."""
        return sum(self.result["laps"][lap]["seconds" if clock == "wall" else "cpu"] for lap in laps)


class Running:
    """A contestant at work, in its own process and folder."""

    def __init__(
        self, contestant: Contestant, source: Path, warm: Path, *, cores: Iterable[int] = (), gate: bool = False
    ) -> None:
        self.contestant = contestant
        (home() / "work").mkdir(parents=True, exist_ok=True)
        self.folder = Path(tempfile.mkdtemp(prefix=f"{contestant.script}-", dir=home() / "work"))
        self.result = self.folder / "result.json"
        told = {
            "input": str(source), "warm": str(warm), "out": str(self.folder / "out"), "result": str(self.result),
            "gate": gate, "options": dict(contestant.options),
        }  # fmt: skip
        (self.folder / "told.json").write_text(json.dumps(told))
        environment = {**os.environ, **ONE_THREAD, **QUIET, TAG: uuid.uuid4().hex}
        environment.pop("RAY_ADDRESS", None)
        chosen = set(cores)
        self.log = (self.folder / "log.txt").open("wb")
        self.process = subprocess.Popen(
            [*contestant.command(), str(self.folder / "told.json")],
            cwd=PROJECT, env=environment, stdin=subprocess.PIPE, stderr=self.log,
            stdout=subprocess.PIPE if gate else self.log,
            preexec_fn=(lambda: os.sched_setaffinity(0, chosen)) if chosen else None,
        )  # fmt: skip

    def wait_until_ready(self) -> None:
        assert self.process.stdout
        while line := self.process.stdout.readline():
            if line.strip() == b"ready":
                return
        self.finish()

    def go(self) -> None:
        assert self.process.stdin
        self.process.stdin.write(b"go\n")
        self.process.stdin.flush()

    def finish(self) -> Measured:
        """Wait for the end. Raises RuntimeError with the end of its log when it failed."""
        try:
            self.process.communicate(timeout=LIMIT)
            if self.process.returncode or not self.result.exists():
                told = (self.folder / "log.txt").read_text(errors="replace").strip().splitlines()
                raise RuntimeError(
                    f"{self.contestant.name} ended with {self.process.returncode}: {' | '.join(told[-3:])}"
                )
            return Measured(json.loads(self.result.read_text()))
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
            self.log.close()
            shutil.rmtree(self.folder, ignore_errors=True)


class Log:
    """Every single run, as a line of JSON, below runs/bench."""

    def __init__(self, name: str) -> None:
        folder = Path("runs/bench")
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}.jsonl"

    def note(self, what: str, **values: Any) -> None:
        with self.path.open("a") as file:
            file.write(
                json.dumps({"at": time.strftime("%H:%M:%S"), "what": what, "load": os.getloadavg()[0], **values}) + "\n"
            )


@dataclass
class Standing:
    """A contestant's runs so far; or why there are none."""

    contestant: Contestant
    runs: list[Measured] = field(default_factory=list)
    reason: str = ""

    def rates(self, clock: str, laps: Sequence[str] = ("work",), of: str = "items") -> list[float]:
        """`of` per second of each run."""
        return [_round(run.result[of] / max(run.seconds(laps, clock), 1e-9)) for run in self.runs]


def last_core() -> int:
    return max(os.sched_getaffinity(0))


def contest(
    contestants: Sequence[Contestant], source: Path, warm: Path, runs: int, log: Log, cores: Iterable[int] = ()
) -> dict[str, Standing]:
    """`runs` rounds on `cores`, by default one; every other goes the other way, so that nobody always has the quiet moment."""
    standings = {c.name: Standing(c) for c in contestants}
    for number in range(runs):
        for contestant in contestants if number % 2 == 0 else reversed(contestants):
            standing = standings[contestant.name]
            if standing.reason:
                continue
            try:
                measured = Running(contestant, source, warm, cores=set(cores) or [last_core()]).finish()
            except (PeerUnavailable, RuntimeError, subprocess.TimeoutExpired) as error:
                if contestant.environment is None:
                    raise
                standing.reason = str(error)
                log.note(contestant.name, failed=standing.reason)
                continue
            standing.runs.append(measured)
            log.note(contestant.name, **measured.result)
    for standing in standings.values():
        if standing.reason:
            standing.runs = []
    return standings


def row(
    name: str,
    unit: str,
    ours: Standing,
    peers: Sequence[Standing],
    *,
    clock: str,
    goal: float | None = None,
    laps: Sequence[str] = ("work",),
    of: str = "items",
    **more: Any,
) -> dict[str, Any]:
    """Medians of ours and of the fastest of `peers`, `of` per second by `clock`; the same by both clocks beside it.

    By `cpu`, a second is a second of CPU of all processes of a contestant, which is a core kept busy for a second.
    """
    there = [peer for peer in peers if peer.runs]
    mine = {each: ours.rates(each, laps, of) for each in ("wall", "cpu")}
    middle = {each: statistics.median(rates) for each, rates in mine.items()}
    made: dict[str, Any] = {"name": name, "unit": unit, "ours": _round(middle[clock])}
    if not there:
        reason = "; ".join(f"{peer.contestant.name}: {peer.reason}" for peer in peers)
        return {**made, "peer": None, "peer_name": None, "ratio": None, "goal": goal, "runs": len(ours.runs),
                "reason": reason, **more}  # fmt: skip
    best = max(there, key=lambda peer: statistics.median(peer.rates(clock, of=of)))
    theirs = {each: best.rates(each, of=of) for each in ("wall", "cpu")}
    ratio = {each: round(middle[each] / statistics.median(theirs[each]), 3) for each in mine}
    made |= {
        "peer": _round(statistics.median(theirs[clock])), "peer_name": best.contestant.name, "ratio": ratio[clock],
        "goal": goal, "runs": len(ours.runs), "clock": clock,
        **{each: {"ours": mine[each], "peer": theirs[each], "ratio": ratio[each]} for each in mine},
    }  # fmt: skip
    if missing := {peer.contestant.name: peer.reason for peer in peers if not peer.runs}:
        made["missing"] = missing
    return {**made, **more}


def _round(value: float) -> float:
    return float(f"{value:.4g}")


def machine() -> dict[str, Any]:
    """What it ran on, in words."""
    named = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    memory = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    return {
        "cpu": named[0] if named else "", "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(int(memory.split()[1]) / 2**20, 1), "load": [round(x, 2) for x in os.getloadavg()],
        "python": sys.version.split()[0],
    }  # fmt: skip
