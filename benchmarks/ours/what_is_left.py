"""Where the time of training steps goes that no multiplication of the model takes: the kernels (on a CPU the operators) that
take most of it, and for how long the device has none to run."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

TOP = 12
"""Kernels that are named."""
LETTERS = 90
"""Of a kernel's name: those of templates fill lines."""


def look(step: Callable[[], object], steps: int, device: torch.device) -> dict[str, Any]:
    """Run `steps` more steps under torch's profiler, which makes those of a CPU slower. Each must wait for the device.

    Returns `idle`, the share of the time in which the device ran nothing, and `kernels`, name → share of the rest.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]
    with profile(activities=activities) as seen:
        begin = time.perf_counter()
        for _ in range(steps):
            step()
        wall = time.perf_counter() - begin
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    events = [e for e in seen.events() or [] if e.device_type == kind and not e.is_user_annotation]
    own: Counter[str] = Counter()
    for event in events:  # kernels of a GPU are not nested, operators are
        own[event.name] += event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total
    busy = covered((e.time_range.start, e.time_range.end) for e in events) / 1e6
    whole = sum(own.values()) or 1.0
    return {
        "idle": round(max(0.0, 1 - busy / wall), 4),
        "kernels": {name[:LETTERS]: round(spent / whole, 4) for name, spent in own.most_common(TOP)},
    }


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """How much of the line the spans cover together, however they overlap."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def lines(found: dict[str, Any]) -> list[str]:
    """For people."""
    kernels = [f"  {share:6.1%}  {name}" for name, share in found["kernels"].items()]
    return [f"  the device was idle for {found['idle']:.1%} of the time; of the rest went to", *kernels]
