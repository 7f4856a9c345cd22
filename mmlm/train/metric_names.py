"""The names of the metrics that a training will write to `metrics.jsonl`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

from mmlm.errors import ConfigError
from mmlm.features import spec as feature_spec
from mmlm.features.spec import FeatureSpec
from mmlm.train.config import TrainConfig
from mmlm.train.objectives import Answering
from mmlm.train.telemetry import GIVEN

FIGURES = (
    "lr", "gradient_norm", "tokens_per_second", "samples_per_second", "tflops", "mfu", "padding", "data_wait", "outside",
    "step_seconds", "cpu_seconds", "memory_rss_bytes", "memory_own_bytes", "memory_cuda_bytes", "skipped", "damaged",
)  # fmt: skip
"""Whatever is learnt; the last three only where there is something of the kind."""


def metric_names(config: TrainConfig, spec: FeatureSpec) -> list[str]:
    """All that a row of this training may have."""
    terms = Answering(config.loss, spec, config.model, across_ranks=False).names
    names = ["loss", *(f"loss_{term}" for term in terms), *(f"loss_given/{given}" for given in GIVEN), *FIGURES]
    if config.validation.every:
        seen = Answering(config.loss.model_copy(update={"contrastive": None}), spec).names
        names += ["val/loss", "val/label_accuracy", "val/best", *(f"val/loss_{term}" for term in seen)]
    return names


def require(metric: str, configs: Iterable[TrainConfig], shards: Path) -> None:
    """Raises ConfigError where none of the trainings on `shards` will have the metric."""
    spec = feature_spec.load(shards)
    known = list(dict.fromkeys(name for config in configs for name in metric_names(config, spec)))
    if metric in known:
        return
    close = difflib.get_close_matches(metric, known, 1, 0.6)
    raise ConfigError(
        f"training writes no metric {metric!r}" + (f", did you mean {close[0]!r}?" if close else ""),
        wanted=f"one of {', '.join(known)}",
        cure="set train.validation.every, without which nothing is validated" if metric.startswith("val/")
        and "val/loss" not in known else "give it with --metric",
    )  # fmt: skip
