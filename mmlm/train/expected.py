"""The plan of a training beside what came of it: written before the first step, compared after the last."""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmlm.features.spec import FeatureSpec
from mmlm.model.baseline_config import AnyModelConfig
from mmlm.storage import write_json
from mmlm.train.config import LoopConfig
from mmlm.world import World

if TYPE_CHECKING:
    from mmlm.train.probe import Teaching

FILE = "plan.json"


def write(
    config: LoopConfig, model: AnyModelConfig, spec: FeatureSpec, shards: Path, out: Path, world: World,
    teacher: Teaching | None = None,
) -> None:  # fmt: skip
    """Plan this training, once for its ranks and how it runs: an attempt that runs alike keeps the plan. Every rank calls
    it and tries the model out, since they will be in each other's way; rank 0 writes. Never ends a training."""
    how = _how(config, world)
    if _planned_for(out / FILE) == how:
        return
    try:
        if world.is_main:  # when no other can be made, what comes is compared with none
            (out / FILE).unlink(missing_ok=True)
        since = int(time.time() * 1000)
        planned = _planned(config, model, spec, shards, world, teacher)
        if world.is_main:
            write_json(out / FILE, {**planned, "how": how, "since": since})
    except Exception as error:
        print(f"train: no plan could be made ({type(error).__name__}: {error})", file=sys.stderr, flush=True)


def _how(config: LoopConfig, world: World) -> dict[str, Any]:
    """What may change between two attempts and changes memory or time."""
    names = {"zero", "accumulate", "recompute", "recompute_granularity", "compile"}
    return {"ranks": world.size, **config.model_dump(mode="json", include=names)}


def _planned_for(file: Path) -> Any:
    """`_how` of the plan that is there; None without one."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))["how"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _planned(
    config: LoopConfig, model: AnyModelConfig, spec: FeatureSpec, shards: Path, world: World, teacher: Teaching | None
) -> dict[str, Any]:
    from mmlm.data.loader import Loader
    from mmlm.train import devices, probe
    from mmlm.train.planning import forecast

    device = devices.find(None)
    with contextlib.closing(Loader(shards, config.data, config.seed, World(), config.steps, quiet=True)) as loader:
        work = probe.workload(loader, config, sequences=256)
    measured = probe.measure(config, model, spec, shards, world.size, teacher=teacher) if device.is_cpu else None
    plan = forecast(
        config, model, spec, work, replace(device), world.size, measured, teacher.model if teacher else None
    )
    return {
        "ranks": world.size,
        "parameters": plan.parameters,
        "step_seconds": plan.step,
        # what a row of figures sees: on a CPU what is held between saves, on a GPU the most since the start
        "memory_bytes": world.size
        * (plan.held - plan.memory["checkpoint"] if device.is_cpu else plan.bytes - plan.memory["runtime"]),
        "device": plan.device,
        "seconds": plan.seconds,
        "memory": plan.memory,
    }


def compared(out: Path, parameters: int) -> dict[str, Any]:
    """`predicted`, `measured` and a line `plan` for people; empty without a plan, or a step after it. What was done before,
    in another way, is left out. Memory is that of all ranks together: resident on a CPU, allocated on a GPU."""
    try:
        planned = json.loads((out / FILE).read_text(encoding="utf-8"))
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        rows = [line["metrics"] for line in lines if line["time"] >= planned["since"]]
    except (OSError, ValueError, KeyError):
        return {}
    steps = [row["step_seconds"] for row in rows if "step_seconds" in row]
    held = [row.get("memory_cuda_bytes") or row.get("memory_rss_bytes", 0.0) for row in rows if "step_seconds" in row]
    if not steps:
        return {}
    names = ("parameters", "step_seconds", "memory_bytes")
    predicted = {name: planned[name] for name in names}
    # the first row holds the start as well
    measured = {
        "parameters": parameters,
        "step_seconds": statistics.median(steps[1:] or steps),
        "memory_bytes": max(held),
    }
    ratio = {name: measured[name] / predicted[name] for name in names}
    line = (
        f"{measured['step_seconds'] * 1e3:.1f} ms a step (planned {predicted['step_seconds'] * 1e3:.1f}), "
        f"{measured['memory_bytes'] / 1e9:.2f} GB (planned {predicted['memory_bytes'] / 1e9:.2f}), "
        f"parameters {'as planned' if ratio['parameters'] == 1 else 'not as planned'}"
    )
    return {"predicted": predicted, "measured": measured, "plan": line}
