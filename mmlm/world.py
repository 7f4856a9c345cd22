"""Who this process is among its ranks, and what this machine has."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class World:
    """Position of this process: `rank` of `size`, `local_rank` on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def from_environment() -> World:
    """The world that torchrun, Ray Train or our own launcher described in the environment; alone without one."""
    env = os.environ
    return World(int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1)), int(env.get("LOCAL_RANK", 0)))


def adopt_slurm() -> None:
    """Make a task of `srun` the rank that it is: its variables become RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR …

    Only inside a step of several tasks: a batch script or a shell of Slurm has a SLURM_PROCID, too, and is no rank.
    What is set already stays.
    """
    env = os.environ
    if "RANK" in env or "SLURM_STEP_ID" not in env or int(env.get("SLURM_STEP_NUM_TASKS", 1)) < 2:
        return
    one_node = env.get("SLURM_STEP_NUM_NODES", "1") == "1"
    first = "127.0.0.1" if one_node else first_host(env["SLURM_STEP_NODELIST"])
    on_node = int(re.match(r"\d+", env.get("SLURM_STEP_TASKS_PER_NODE", "1"))[0])  # type: ignore[index]
    cpus = int(env.get("SLURM_CPUS_PER_TASK") or max(1, cores() // on_node))
    said = {
        "RANK": env["SLURM_PROCID"],
        "WORLD_SIZE": env["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": env["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(on_node),
        "MASTER_ADDR": first,
        "MASTER_PORT": str(20000 + int(env["SLURM_JOB_ID"]) % 5000 * 2),
        "OMP_NUM_THREADS": str(cpus),
    }
    if one_node:
        said["GLOO_SOCKET_IFNAME"] = "lo"  # else gloo resolves the host's name, which not every node can
    for key, value in said.items():
        env.setdefault(key, value)


def is_one_task(gpus: int = 0) -> bool:
    """Whether Slurm was asked for one task, and this is it: a step of `srun`, or where there are no GPUs the whole job. A
    job of one task with several GPUs is the usual way to let a launcher start the ranks."""
    env = os.environ
    if "SLURM_STEP_ID" in env:
        return env.get("SLURM_STEP_NUM_TASKS") == "1"
    return not gpus and env.get("SLURM_NTASKS") == "1"


def first_host(nodes: str) -> str:
    """The first name of Slurm's short form of a list: `gpu[03-05,9],cpu1` → `gpu03`."""
    found = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\])?([^,\[]*)", nodes)
    return "".join(part or "" for part in found.groups()) if found else nodes


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def quiet_environment() -> dict[str, str]:
    """Settings without which our components phone home or guess. Telemetry is off by default everywhere."""
    return {
        "RAY_USAGE_STATS_ENABLED": "0",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "1",
        "DAGSTER_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "GIT_PYTHON_REFRESH": "quiet",
    }


def apply_quiet_environment() -> None:
    """Set what `quiet_environment` says, where the user has not said otherwise."""
    for key, value in quiet_environment().items():
        os.environ.setdefault(key, value)
