"""No rank waits for another whose batch lacks a modality, whatever the fusion, and its gradients are those of one process."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from tests.model.test_fusion import FUSIONS
from tests.train.parity import BASE
from tests.train.test_parity import compare, zero


def fused(fusion: str, stage: int, accumulate: int = 1, **config: Any) -> dict[str, Any]:
    return {"config": zero(stage, accumulate, model={**BASE["model"], "fusion": fusion}, **config)}


def test_ranks_that_lack_a_modality_keep_up_in_every_fusion(tmp_path: Path):
    others = [name for name in FUSIONS if name != "concat"]  # that one has a test of its own
    compare(2, tmp_path, [fused(name, stage) for name in others for stage in (3, 1)], steps=6)


@pytest.mark.slow
@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_fusion_at_every_stage_and_cut(fusion: str, tmp_path: Path):
    cuts = itertools.product((0, 1, 2, 3), (1, 2, 4), ("fp32", "bf16"))
    compare(2, tmp_path, [fused(fusion, s, a, precision=p) for s, a, p in cuts], steps=8)
