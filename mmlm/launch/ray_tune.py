"""Trials of a search side by side on Ray, the bad ones stopped early (ASHA; Li et al. 2020).

A trial is a command that writes rows `{"step", "metrics"}` into a file, as training does, and leaves another file when it
is done. The actor that Ray gives it starts the command, reports its rows, and ends it when ASHA says so. Rows that are
there already are reported first, so that a search goes on from its files: Ray's own state is thrown away.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune

from mmlm.errors import ConfigError, Interrupted
from mmlm.progress import Progress

STOP_SECONDS = 60.0
"""How long a stopped trial may take to save."""
POLL_SECONDS = 0.2
HALT = "halt"
"""In the report of a trial: why the whole search ends."""


@dataclass(frozen=True)
class TrialPlan:
    """One trial, as plain words that travel to its actor."""

    number: int
    command: list[str]
    environment: dict[str, str]
    rows: str
    """The file in which the command writes its rows."""
    done: str
    """The file that is there when the command has done its work."""
    log: str
    steps: int
    """The last step of the command."""


@dataclass(frozen=True)
class Objective:
    """Which figure of a row is looked at, and how. `mean_of`: rows whose mean it is, against noise."""

    metric: str
    mode: str
    mean_of: int
    steps: int
    grace: int
    """Steps before which nothing is stopped."""
    reduction: int
    """Of how many trials that reach a rung one goes on."""


@dataclass(frozen=True)
class Outcome:
    number: int
    value: float | None
    """The best that the trial reported."""
    step: int
    """The last step that was reported."""
    error: str
    finished: bool
    """False for a trial that ASHA stopped before its last step."""
    seconds: float


class Trial(tune.Trainable):
    """One trial. `step` gives the next reported row; `cleanup` leaves no process behind."""

    def setup(self, config: dict[str, Any], secrets: Mapping[str, str] | None = None) -> None:  # type: ignore[override]
        self.secrets = dict(secrets or {})
        self.plan, self.objective = TrialPlan(**config["plan"]), Objective(**config["objective"])
        self.process: subprocess.Popen[bytes] | None = None
        self.reported = 0
        self.recent: deque[float] = deque(maxlen=self.objective.mean_of)
        self.last: dict[str, Any] = {"step": 0, "value": _worst(self.objective.mode)}
        if not Path(self.plan.done).exists():
            self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        environment = {**os.environ, **self.plan.environment, **self.secrets, "MMLM_PARENT": str(os.getpid())}
        with open(self.plan.log, "ab") as log:
            return subprocess.Popen(
                self.plan.command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )

    def step(self) -> dict[str, Any]:
        while True:
            over = self.process is None or self.process.poll() is not None  # asked first: it may write until its end
            done = over and Path(self.plan.done).exists()
            rows = values(Path(self.plan.rows), self.objective.metric)
            # who took its last step is let end before that is told: to stop it then saves nothing, and loses its model
            if len(rows) > self.reported and (done or rows[self.reported][0] < self.plan.steps):
                step, value = rows[self.reported]
                self.reported += 1
                self.recent.append(value)
                mean = sum(self.recent) / len(self.recent)
                self.last = self.last | {
                    "step": step,
                    "value": mean if math.isfinite(mean) else _worst(self.objective.mode),
                }
                return self.last
            if unknown := missing(Path(self.plan.rows), self.objective.metric, done):
                return {**self.last, HALT: f"columns: {', '.join(unknown)}", "done": True}
            if done:
                return {**self.last, "done": True}
            if over and self.process and self.process.returncode == Interrupted.exit_code:
                return {**self.last, HALT: last_words(Path(self.plan.log)), "done": True}
            if over:
                raise RuntimeError(last_words(Path(self.plan.log)))
            time.sleep(POLL_SECONDS)

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        return {"reported": self.reported}  # the training keeps its own; Tune asks for one at every end

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        self.reported = 0

    def cleanup(self) -> None:
        if self.process is None or self.process.poll() is not None:
            return
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Halt(tune.Stopper):
    """Ends the search at the first trial that says so: it was interrupted, or the metric is none."""

    def __init__(self) -> None:
        self.why = ""

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        self.why = self.why or result.get(HALT, "")
        return False

    def stop_all(self) -> bool:
        return bool(self.why)


class Said(tune.Callback):
    """One line of progress for each trial that ends."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune keeps its callbacks in its state, and a terminal cannot be pickled

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        value = (trial.last_result or {}).get("value", math.nan)
        self.progress.add(1, f"trial {trial.config['plan']['number']}: {value:.5g}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.progress.add(1, f"trial {trial.config['plan']['number']} failed")


def values(path: Path, metric: str) -> list[tuple[int, float]]:
    """(step, value) of each row that has the metric; a last line that is still being written is left for later."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if metric in row.get("metrics", {}) and row.get("step"):
                found.append((int(row["step"]), float(row["metrics"][metric])))
    return found


def missing(path: Path, metric: str, done: bool) -> list[str]:
    """The columns of the rows that should have the metric, when none has it; none as long as it may still come.

    A row without `loss` says nothing: all its steps were skipped.
    """
    with contextlib.suppress(OSError, ValueError):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
        columns = {name for row in rows if row.get("step") for name in row["metrics"]}
        validated = metric.startswith("val/") and any(name.startswith("val/") for name in columns)
        if "loss" in columns and metric not in columns and (done or validated or "/" not in metric):
            return sorted(columns)
    return []


def last_words(log: Path) -> str:
    """What a failed command said at its end: its `mmlm: …` line if there is one."""
    try:
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    except OSError:
        return "it left no word"
    said = [line.removeprefix("mmlm: ") for line in lines if line.startswith("mmlm: ")]
    return (said or lines or ["it left no word"])[-1][:400]


def _worst(mode: str) -> float:
    return 1e30 if mode == "min" else -1e30


@contextlib.contextmanager
def connected(folder: Path | None = None, cpus: int = 1) -> Iterator[None]:
    """This process on a Ray of its own with `cpus`, whose files lie in `folder`; without one on that of its job, which it may
    have joined already and stays in then."""
    if folder is None and ray.is_initialized():
        yield
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    handler = signal.getsignal(signal.SIGTERM)  # Ray would put its own in place of the caller's
    try:
        if folder is None:
            ray.init(**quiet)
        else:
            ray.init(
                address="local", num_cpus=cpus, include_dashboard=False, object_store_memory=100 << 20,
                _temp_dir=str(folder), **quiet,
            )  # fmt: skip
            signal.signal(signal.SIGTERM, handler)
        yield
    finally:
        ray.shutdown()


def search(
    plans: list[TrialPlan], objective: Objective, *, parallel: int, ranks: int, gpu: bool, storage: Path,
    secrets: Mapping[str, str] | None = None,
) -> list[Outcome]:  # fmt: skip
    """Run all trials of `ranks` ranks on the Ray that this process is connected to, `parallel` at a time.

    Failures are outcomes, too. `secrets` are variables of every trial that Tune must not write into its files, as it does
    with all that a plan holds: they go by the object store.

    Raises Interrupted when a trial was stopped before its end (a time limit), ConfigError when no row has the metric.
    """
    from ray.tune.schedulers import AsyncHyperBandScheduler

    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # Ctrl-C is ours: the command is run again to go on
    os.environ.setdefault("RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS", "0")
    scheduler = AsyncHyperBandScheduler(
        time_attr="step", metric="value", mode=objective.mode, max_t=objective.steps,
        grace_period=objective.grace, reduction_factor=objective.reduction,
        stop_last_trials=False,  # the last row comes before the model is written
    )  # fmt: skip
    each = {kind: float(ranks) for kind in ("CPU", *["GPU"] * gpu)}
    logging.getLogger("ray.tune").setLevel(
        logging.CRITICAL
    )  # it shows tracebacks of trials, whose errors are told below
    halt = Halt()
    with _quiet(), Progress("tune", len(plans), "trials") as progress:
        grid = tune.Tuner(
            tune.with_resources(tune.with_parameters(Trial, secrets=dict(secrets or {})), each),
            param_space={"plan": tune.grid_search([vars(plan) for plan in plans]), "objective": vars(objective)},
            tune_config=tune.TuneConfig(scheduler=scheduler, max_concurrent_trials=parallel),
            run_config=tune.RunConfig(
                storage_path=str(storage),
                name="trials",
                verbose=0,
                callbacks=[Said(progress)],
                stop=halt,
            ),
        ).fit()
    _look(halt.why, objective)
    return [_outcome(grid[at], objective) for at in range(len(grid))]


def _look(why: str, objective: Objective) -> None:
    """Raise what ended the whole search, if something did."""
    if why.startswith("columns: "):
        raise ConfigError(
            f"no row of metrics.jsonl has the metric {objective.metric!r}",
            wanted=f"one of {why.removeprefix('columns: ')}",
            cure="give it with --metric, and --replace",
        )
    if why:
        raise Interrupted(
            f"the search was stopped: {why.partition('; ')[0]}", cure="run the same command again to go on"
        )


def _outcome(result: Any, objective: Objective) -> Outcome:
    plan = TrialPlan(**result.config["plan"])
    rows = values(Path(plan.rows), objective.metric)
    best = (min if objective.mode == "min" else max)((v for _, v in _means(rows, objective.mean_of)), default=None)
    return Outcome(
        plan.number, best, rows[-1][0] if rows else 0, last_words(Path(plan.log)) if result.error else "",
        Path(plan.done).exists() or bool(rows and rows[-1][0] >= plan.steps), _seconds(Path(plan.rows)),
    )  # fmt: skip


def _seconds(path: Path) -> float:
    """From the first row to the last; a trial that was only looked at again keeps what it took."""
    with contextlib.suppress(OSError, ValueError, KeyError, IndexError):
        times = [json.loads(line)["time"] for line in path.read_text(encoding="utf-8").splitlines()]
        return float(times[-1] - times[0]) / 1000
    return 0.0


def _means(rows: list[tuple[int, float]], count: int) -> Iterator[tuple[int, float]]:
    for at in range(len(rows)):
        recent = [value for _, value in rows[max(0, at + 1 - count) : at + 1]]
        if all(math.isfinite(value) for value in recent):
            yield rows[at][0], sum(recent) / len(recent)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Ray Tune speaks of its folders, which are thrown away."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
    sys.stdout.flush()
