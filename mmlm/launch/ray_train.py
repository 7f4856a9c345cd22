"""Ranks on a Ray cluster, placed on its nodes and started again when a worker or node is lost (Ray Train).

Each worker finds RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT in its environment, and torch.distributed
already initialised by Ray's torch backend: the target must ask `dist.is_initialized()` first. It runs outside the main
thread, where no signal arrives: the driver turns a stop into a file, MMLM_STOP_FILE of the workers, and waits until they
have saved. After a loss the target is called anew and continues from its own checkpoints,
which therefore lie on storage that every node sees, as `log` does: on as many ranks as before when there is room for
them, else on fewer, and on more again when a node comes back.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmlm.errors import Interrupted, LaunchError, MmlmError, WorkLost
from mmlm.launch.local import Launch, RankCrashed, again, count_signals, read_error
from mmlm.progress import tell
from mmlm.world import quiet_environment

RESTARTS = 3
"""Losses of workers or nodes that a run survives between two checkpoints."""
STOP = "stop"
"""File beside the logs by which the ranks learn of a stop: no signal reaches them."""
STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
"""Ray's own variable: seconds between the SIGTERM and the SIGKILL of a job that is stopped (by default 3)."""
MOST = {"CPU": "MMLM_RAY_MOST_CPUS", "GPU": "MMLM_RAY_MOST_GPUS"}
"""Variables of a job that say to how many its cluster may grow (launch/kuberay.py)."""
STOP_SECONDS = 600.0
"""What we set it to. A large model takes minutes to save, and on NFS a new file may be seen only after one."""


def ranks(n: int | None = None) -> Launch:
    """A launch of `n` ranks on the Ray cluster that this process belongs to (as a Ray job does), one CPU or GPU each.

    By default one rank per GPU of the cluster, or two on a cluster without GPUs. Raises LaunchError when the cluster
    has fewer GPUs or CPUs than that, and may not grow to them (MOST): Ray would wait for them for ever.
    """
    import ray

    if not ray.is_initialized():
        ours = signal.getsignal(signal.SIGTERM)
        ray.init(log_to_driver=True)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, ours)  # Ray's own handler ends the process with 15, which nobody resumes
    return fitting(n, ray.cluster_resources(), {kind: int(os.environ.get(name) or 0) for kind, name in MOST.items()})


def fitting(n: int | None, has: Mapping[str, float], most: Mapping[str, int]) -> RayRanks:
    """`ranks` of a cluster that has so much of each kind now, and may grow to `most`. Raises as that does."""
    gpus, cpus = (max(int(has.get(kind, 0)), most.get(kind, 0)) for kind in ("GPU", "CPU"))
    wanted = n or int(has.get("GPU", 0)) or gpus or min(2, cpus)
    available, kind = (gpus, "GPUs") if gpus else (cpus, "CPUs")
    if not gpus:
        tell(f"no GPU on the Ray cluster now: {wanted} ranks train on its CPUs")
    if wanted < 1 or wanted > available:
        raise LaunchError(
            f"{wanted} ranks on a Ray cluster with {available} {kind}",
            wanted="one for each rank",
            cure="give a smaller --ranks, or add nodes (`ray start --address=…`)",
        )
    return RayRanks(wanted, gpu=gpus > 0, threads=max(1, cpus // wanted))


@dataclass(frozen=True)
class RayRanks:
    """`ranks` Ray Train workers; `threads` is what each may use for arithmetic on a CPU."""

    ranks: int
    gpu: bool
    threads: int

    def __call__(self, target: str, args: dict[str, Any], *, log: Path) -> None:
        log.mkdir(parents=True, exist_ok=True)
        log = log.resolve()
        # with the default of 2 s, work done just before a loss was forgotten by Ray Train
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.3")
        os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
        losses = Losses(log.parent / "checkpoints")
        (log / STOP).unlink(missing_ok=True)
        with count_signals(Asked()) as asked:
            while (lost := self._attempt(target, args, log, asked)) is not None:
                if asked.signals:
                    raise Interrupted("training was stopped before it could save", cure=again(log))
                if not losses.survivable():
                    raise lost
                tell(f"{_sentence(lost)}; starting the ranks again ({losses.count} of {RESTARTS})")
        if asked.signals:  # the ranks were done, or as good as done; but nothing may follow them
            raise Interrupted("training was stopped", cure=again(log))

    def _attempt(self, target: str, args: dict[str, Any], log: Path, asked: Asked) -> Exception | None:
        """Run the ranks once. Returns what was lost; raises what starting again would not mend."""
        for stale in log.glob("rank-*.error.json"):
            stale.unlink()
        failed: Exception | None = None
        try:
            stoppable(lambda: self._fit(target, args, log), log / STOP, asked, patience())
        except Interrupted:
            _let_go()
            raise
        except Exception as error:  # Ray Train wraps whatever happened in kinds of its own
            failed = error
        said = [e for rank in range(self.ranks) if (e := read_error(log, rank))]
        for told in said:
            if isinstance(told, MmlmError) and not isinstance(told, RankCrashed | WorkLost):
                raise told  # bad input stays bad; a hang need not come back
        if failed is None:
            return None
        lost = WorkLost(f"the ranks were lost: {_innermost(failed)}", cure=f"see {log}; {again(log)}")
        return said[0] if said else lost

    def _fit(self, target: str, args: dict[str, Any], log: Path) -> None:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        from mmlm.launch.ray_backend import AddressedTorch

        each = {"CPU": 1.0, "GPU": 1.0} if self.gpu else {"CPU": 1.0}
        TorchTrainer(
            run_rank,
            train_loop_config={"target": target, "args": args, "log": str(log)},
            torch_config=AddressedTorch(),
            scaling_config=ScalingConfig(
                num_workers=self.ranks if self.ranks == 1 else (1, self.ranks),  # type: ignore[arg-type]  # V1's stubs
                use_gpu=self.gpu,
                resources_per_worker=each,
            ),
            run_config=RunConfig(
                name=f"ranks-{uuid.uuid4().hex[:8]}",  # a name used before would take up that run's state
                storage_path=str(log / "ray"),
                failure_config=FailureConfig(max_failures=0),  # `Losses` counts
                worker_runtime_env={"env_vars": {**self.environment(), "MMLM_STOP_FILE": str(log / STOP)}},  # type: ignore[call-arg]  # the stubs are V1's
            ),
        ).fit()

    def environment(self) -> dict[str, str]:
        environment = {**quiet_environment(), "OMP_NUM_THREADS": str(self.threads)}
        if not self.gpu:
            environment["DS_ACCELERATOR"] = "cpu"
        return environment


def run_rank(config: dict[str, Any]) -> None:
    """One worker: call the target; leave what went wrong beside the log, where the driver finds it."""
    from mmlm.launch.rank import describe, resolve
    from mmlm.storage import write_json

    mine = Path(config["log"]) / f"rank-{os.environ['RANK']}.error.json"
    try:
        resolve(config["target"])(**config["args"])
    except Interrupted as stopped:  # saved: for Ray Train that is a good end, after which it starts nothing again
        write_json(mine, describe(stopped))
    except Exception as error:
        write_json(mine, describe(error))
        raise


class Asked:
    """Stop signals that this process got, and which was the first."""

    signals = 0
    number = 0


class Losses:
    """Losses of workers or nodes since the newest checkpoint of `folder` was written."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        self._newest = self._step()

    def survivable(self) -> bool:
        """Count one more; whether the run may start again."""
        newest = self._step()
        self.count = 1 if newest > self._newest else self.count + 1
        self._newest = newest
        return self.count <= RESTARTS

    def _step(self) -> int:
        return max((int(path.name.partition("-")[2]) for path in self.folder.glob("step-*")), default=-1)


def patience() -> float:
    """Seconds for the ranks to end after a stop: those that Ray's `job stop` leaves, less a few for what follows here."""
    try:
        told = float(os.environ.get(STOP_WAIT, STOP_SECONDS))
    except ValueError:
        told = STOP_SECONDS
    return max(told / 2, told - 15.0)


def stoppable(work: Callable[[], object], file: Path, asked: Asked, seconds: float) -> None:
    """Call `work` in a thread; at a stop signal write `file`, and give `work` so many `seconds` to end by itself.

    Raises what `work` raises, and Interrupted when it did not end in time, or at a second signal.
    """
    outcome: Future[None] = Future()
    threading.Thread(target=_settle, args=(outcome, work), daemon=True, name="ray-train").start()
    give_up = math.inf
    while not outcome.done():
        if asked.signals and give_up == math.inf:
            give_up = time.monotonic() + seconds
            file.touch()
            tell(f"asked to stop: the ranks have {seconds:.0f} s to finish their step and save")
        if asked.signals > 1 or time.monotonic() > give_up:
            raise Interrupted("training was stopped before it could save", cure=again(file.parent))
        wait([outcome], timeout=0.2)
    outcome.result()


def _settle(outcome: Future[None], work: Callable[[], object]) -> None:
    try:
        work()
        outcome.set_result(None)
    except BaseException as error:
        outcome.set_exception(error)


def _let_go() -> None:
    """End what this process still has running on the cluster."""
    import ray

    ray.shutdown()


def _sentence(error: Exception) -> str:
    return error.found if isinstance(error, MmlmError) else str(error)


def _innermost(error: BaseException) -> str:
    """The last line of the deepest cause: the sentence that a person needs."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        return _innermost(next(iter(failures.values())))
    lines = [line for line in str(error).splitlines() if line.strip()]
    return (lines[-1].strip() if lines else type(error).__name__)[:300]
