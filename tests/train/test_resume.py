"""A training that goes on elsewhere, on another number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmlm.artifacts import Artifact
from mmlm.config import parse
from mmlm.launch.local import ranks
from mmlm.tracking import NullTracker
from mmlm.train.config import TrainConfig
from mmlm.train.train import train
from tests.train.runs import SMALL, losses, stopped

BASE: dict[str, Any] = {**SMALL, "steps": 4, "save_every": 2, "keep": 3, "precision": "fp32"}


def run(shards: Artifact, out: Path, count: int, **changes: Any) -> Artifact:
    config = parse(TrainConfig, {**BASE, **changes}, "test")
    return train(config, shards, out=out, launch=ranks(count), tracker=NullTracker())


@pytest.mark.parametrize(("before", "after"), [(2, 1), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_a_training_of_embeddings_goes_on_on_another_number_of_ranks(
    keypad_shards: Artifact, tmp_path: Path, before: int, after: int
):
    """The probe batch is whole on every rank: gathered, each of its records would be a negative of itself."""
    changes = {
        "model": {**SMALL["model"], "embedding": 16}, "loss": {"contrastive": {"between": [["image", "audio"]]}},
    }  # fmt: skip
    first = run(keypad_shards, tmp_path / "first", before, **changes)
    out = stopped(first, tmp_path / "model", 2)
    run(keypad_shards, out, after, **changes)
    assert losses(out) == pytest.approx(losses(first.path), rel=1e-4)
