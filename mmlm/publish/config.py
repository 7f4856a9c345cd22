"""Settings of `register`: which model is published, and what the gate compares."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mmlm.config import Config


class GateConfig(Config):
    """When a new model takes the champion's place. Both answer the same test records."""

    confidence: float = Field(0.5, ge=0, le=1)
    """Needed probability (paired bootstrap over groups of records) that the new model is better. 0.5: it only must not
    be worse, which suits a trial; 0.95 suits production."""
    min_value: float | None = None
    """A new model below this value of the metric is never promoted, not even as the first."""
    task: str | None = None
    """Task that is compared; absent: the first of the shard set."""
    metric: Literal["accuracy", "f1", "exact_match", "chrf", "mae"] | None = None
    """Absent: accuracy where the task has classes, f1 where several of them may hold, mae for a number, else chrf.
    `accuracy` and `exact_match` compare right and wrong record by record, `f1` and `chrf` the score of each answer, `mae`
    the error of each number, as a negative value (so min_value: -2 wants a mean error of at most 2)."""
    modalities: str | None = None
    """The row that is compared, such as `text+image+audio`; absent: the one with everything given."""


class RegisterConfig(Config):
    """What is published, and under which name."""

    model: Literal["student", "teacher"] = "student"
    """Which checkpoint; a story without distillation has only the teacher."""
    name: str | None = Field(None, pattern=r"^[^/:@\s]+$")
    """Name of the registered model; absent: `mmlm-<story>`."""
    gate: GateConfig = GateConfig()
