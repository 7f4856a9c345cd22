"""Who this process is among its ranks, and what this machine has."""

from __future__ import annotations

import os
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
