"""Ranks on a Ray cluster, placed on its nodes and started again when a worker or node is lost (Ray Train).

Each worker finds RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT in its environment, and torch.distributed
already initialised by Ray's torch backend: the target must ask `dist.is_initialized()` first. It runs outside the main
thread, so it cannot set signal handlers. After a loss the target is called anew and continues from its own checkpoints,
which therefore lie on storage that every node sees, as `log` does: on as many ranks as before when there is room for
them, else on fewer, and on more again when a node comes back.
"""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmlm.errors import LaunchError, WorkLost
from mmlm.launch.local import AGAIN, Launch, RankCrashed, read_error
from mmlm.world import quiet_environment

RESTARTS = 3
"""Lost workers or nodes that a run survives."""


def ranks(n: int | None = None) -> Launch:
    """A launch of `n` ranks on the Ray cluster that this process belongs to (as a Ray job does), one CPU or GPU each.

    By default one rank per GPU of the cluster, or two on a cluster without GPUs. Raises LaunchError when the cluster
    has fewer GPUs or CPUs than that: Ray would wait for them for ever.
    """
    import ray

    if not ray.is_initialized():
        ray.init(log_to_driver=True)
    has = ray.cluster_resources()
    gpus, cpus = int(has.get("GPU", 0)), int(has.get("CPU", 0))
    wanted = n or gpus or min(2, cpus)
    available, kind = (gpus, "GPUs") if gpus else (cpus, "CPUs")
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
        for stale in log.glob("rank-*.error.json"):
            stale.unlink()
        # with the default of 2 s, work done just before a loss was forgotten by Ray Train
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.3")
        os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
        try:
            self._fit(target, args, log.resolve())
        except Exception as error:  # Ray Train wraps whatever happened in kinds of its own
            said = [e for rank in range(self.ranks) if (e := read_error(log, rank))]
            meant = [e for e in said if not isinstance(e, RankCrashed)]
            lost = WorkLost(
                f"the ranks were lost {RESTARTS + 1} times: {_innermost(error)}", cure=f"see {log}; {AGAIN}"
            )
            raise (meant + said + [lost])[0] from None

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
                failure_config=FailureConfig(max_failures=RESTARTS),
                worker_runtime_env={"env_vars": self.environment()},  # type: ignore[call-arg]  # the stubs are V1's
            ),
        ).fit()

    def environment(self) -> dict[str, str]:
        environment = {**quiet_environment(), "OMP_NUM_THREADS": str(self.threads)}
        if not self.gpu:
            environment["DS_ACCELERATOR"] = "cpu"
        return environment


def run_rank(config: dict[str, Any]) -> None:
    """One worker: call the target; leave what went wrong beside the log, where the driver finds it."""
    from mmlm.errors import MmlmError, WorkLost
    from mmlm.launch.rank import describe, resolve
    from mmlm.storage import write_json

    log = Path(config["log"])
    mine = log / f"rank-{os.environ['RANK']}.error.json"
    for rank in range(int(os.environ["WORLD_SIZE"])):
        earlier = read_error(log, rank)
        if isinstance(earlier, MmlmError) and not isinstance(earlier, RankCrashed | WorkLost):
            raise earlier  # Ray restarts the group after any error; bad input stays bad, a hang need not come back
    mine.unlink(missing_ok=True)
    try:
        resolve(config["target"])(**config["args"])
    except Exception as error:
        write_json(mine, describe(error))
        raise


def _innermost(error: BaseException) -> str:
    """The last line of the deepest cause: the sentence that a person needs."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        return _innermost(next(iter(failures.values())))
    lines = [line for line in str(error).splitlines() if line.strip()]
    return (lines[-1].strip() if lines else type(error).__name__)[:300]
