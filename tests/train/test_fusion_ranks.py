"""No rank waits for another whose batch lacks a modality, whatever fusion and layout, and its gradients are those of one process.

Rounding: float32, and six steps of AdamW in which it grows: to 1.2e-5 of the gradients' norm in the deepest fusion.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from tests.model.test_fusion import FUSIONS
from tests.train.parity import BASE
from tests.train.test_parity import compare, on_ranks, zero

LAYOUTS = ("encoder", "encoder_decoder")


def fused(fusion: str, stage: int, accumulate: int = 1, layout: str = "decoder", **config: Any) -> dict[str, Any]:
    return {"config": zero(stage, accumulate, model={**BASE["model"], "fusion": fusion, "layout": layout}, **config)}


def keep_up(asked: list[dict[str, Any]], out: Path) -> None:
    for one, row in zip(asked, on_ranks(2, "compare", out, combinations=asked, steps=6), strict=True):
        assert row["losses"] == pytest.approx(row["expected"], rel=1e-5), one
        assert row["gradient"] < 5e-5 and all(apart < 5e-5 for apart in row["states"].values()), one


def test_ranks_that_lack_a_modality_keep_up_in_every_fusion(tmp_path: Path):
    """Stage 3, which waits for ever where a rank stays away; and two more, which gather gradients otherwise."""
    others = [fused(name, 3) for name in FUSIONS if name != "concat"]  # that one has a test of its own
    asked = [*others, fused("late", 1, 2), fused("adversarial", 2, 2)]
    keep_up(asked, tmp_path)


def test_ranks_that_lack_a_modality_keep_up_in_every_layout(tmp_path: Path):
    """One record a micro-batch: a piece of text leaves one rank nothing for an encoder to read."""
    asked = [fused("adversarial", 3, 4, "encoder"), fused("late", 3, 4, "encoder_decoder")]
    asked.append(fused("cross_attention", 2, 4, "encoder_decoder"))
    keep_up(asked, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_fusion_at_every_stage_and_cut(fusion: str, tmp_path: Path):
    cuts = itertools.product((0, 1, 2, 3), (1, 2, 4), ("bf16",))
    compare(2, tmp_path, [fused(fusion, s, a, precision=p) for s, a, p in cuts], steps=8)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_fusion_of_a_layout_at_every_stage(fusion: str, layout: str, tmp_path: Path):
    keep_up([fused(fusion, s, a, layout) for s, a in itertools.product((0, 1, 2, 3), (1, 4))], tmp_path)
