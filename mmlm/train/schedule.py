"""The learning rate of a step."""

from __future__ import annotations

import math

from mmlm.train.config import ScheduleConfig, WsdConfig


def learning_rate(step: int, steps: int, peak: float, schedule: ScheduleConfig) -> float:
    """Rate of optimizer step `step` of `steps`, counted from 0."""
    warm = max(1, int(steps * schedule.warmup))
    if step < warm:
        return peak * (step + 1) / warm
    if isinstance(schedule, WsdConfig):
        first = min(steps - 1, max(warm, steps - max(1, round(steps * schedule.decay))))
        falling = max(0.0, (step - first) / max(1, steps - first))
        height = 1 - math.sqrt(falling)
    else:
        height = 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
    return peak * (schedule.floor + (1 - schedule.floor) * height)
