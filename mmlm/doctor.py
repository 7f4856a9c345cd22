"""What this machine can do: cores, memory, disk, GPUs, versions, and what is missing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from typing import Any

from mmlm import __version__
from mmlm.world import cores

PACKAGES = {
    "torch": "train", "deepspeed": "train", "ray": "shard", "webdataset": "shard", "pyarrow": "scan", "mlflow": "register",
    "tokenizers": "shard", "pillow": "shard", "resvg-py": "shard", "soundfile": "shard", "soxr": "shard",
    "scikit-learn": "evaluate", "sacrebleu": "evaluate", "matplotlib": "evaluate", "fastapi": "serve", "dagster": "pipelines",
}  # fmt: skip
"""package → the stage that needs it."""


def examine() -> dict[str, Any]:
    """Facts about this machine as plain JSON values; `problems` lists what keeps a stage from running."""
    versions: dict[str, str | None] = {}
    problems = []
    for name, stage in PACKAGES.items():
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
            problems.append(f"{name} is not installed: `{stage}` needs it (make venv installs everything)")
    gpus = _gpus()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    disk = shutil.disk_usage(".").free
    if memory < 6e9:
        problems.append(
            f"{memory / 1e9:.1f} GB of memory: the demo needs about 4, a training on your data may need more"
        )
    if disk < 5e9:
        problems.append(f"{disk / 1e9:.1f} GB of disk are free: 5 are a safe beginning")
    return {
        "mmlm": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": cores(),
        "memory_bytes": memory,
        "disk_free_bytes": disk,
        "gpus": gpus,
        "backend": "nccl" if gpus else "gloo",
        "default_ranks": len(gpus) or min(2, cores()),
        "versions": versions,
        "problems": problems,
    }


def _gpus() -> list[str]:
    try:
        found = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in found.stdout.splitlines() if line.strip()] if found.returncode == 0 else []


def words(found: dict[str, Any]) -> str:
    lines = [
        f"mmlm {found['mmlm']}, Python {found['python']}, {found['system']}",
        f"{found['cores']} cores, {found['memory_bytes'] / 2**30:.1f} GiB of memory, "
        f"{found['disk_free_bytes'] / 2**30:.0f} GiB of disk free",
        f"GPUs: {', '.join(found['gpus']) or 'none'}: training runs on {found['default_ranks']} ranks over {found['backend']}",
        "versions: " + ", ".join(f"{k} {v or 'MISSING'}" for k, v in found["versions"].items()),
    ]
    return "\n".join(lines + ([f"! {problem}" for problem in found["problems"]] or ["nothing is missing"]))
