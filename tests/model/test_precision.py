"""How far float32 and bfloat16 are from float64, for every form of the model: the bounds that docs/guide.md states."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from mmlm.data.collate import Batch, pack
from mmlm.model.config import ModelConfig
from mmlm.train import weights
from mmlm.train.config import LossConfig
from mmlm.train.objectives import Answering, loss_of
from tests.small import SPEC, sample

CLASSIC = {"norm": "layer", "norm_at": "after", "mlp": "relu", "kv_heads": 4, "qk_norm": False}
FORMS: dict[str, dict[str, Any]] = {
    "default": {},
    "no QK-norm": {"qk_norm": False},
    "LayerNorm, GELU, learned": {"norm": "layer", "mlp": "gelu", "positions": "learned"},
    "Vaswani's": {**CLASSIC, "layout": "encoder_decoder", "positions": "sinusoidal"},
    "encoder-decoder": {"layout": "encoder_decoder"},
    "encoder of experts": {"layout": "encoder", "fusion": {"kind": "late"}},
    "gated encoder-decoder": {"layout": "encoder_decoder", "fusion": {"kind": "cross_attention"}},
    "BERT's": {**CLASSIC, "layout": "encoder", "positions": "learned"},
    "muP": {"initialisation": {"kind": "mup", "base_width": 32, "base_head_width": 8}},
}
BOUNDS = {torch.float32: (1e-6, 1e-6, 2e-6), torch.bfloat16: (0.012, 1e-3, 0.04)}
"""Relative error of hidden states (root mean square), of the loss, and of the whole gradient."""


@pytest.mark.parametrize("form", FORMS)
def test_precisions_stay_within_their_bounds(form: str):
    """The same weights, which bfloat16 can hold, in all three."""
    torch.manual_seed(0)
    config = ModelConfig(**{"width": 128, "layers": 4, "heads": 4, "attention": "prefix", **FORMS[form]})
    spec = SPEC.model_copy(update={"tasks": SPEC.tasks[:1]})
    net = weights.build(config, spec).bfloat16()
    given = [("image", "audio"), ("audio",), (), ("fields", "context"), ("image",)]
    batch = pack([[sample(i, given[i % 5]) for i in range(r, r + 4)] for r in range(0, 16, 4)], spec)
    exact = measured(copy.deepcopy(net).double(), batch)
    for dtype, bounds in BOUNDS.items():
        found = measured(copy.deepcopy(net).to(dtype), batch)
        errors = [float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]
        assert all(error < bound for error, bound in zip(errors, bounds, strict=True)), (dtype, errors)


def measured(net: Any, batch: Batch) -> list[torch.Tensor]:
    """Hidden states, loss, gradient, in float64."""
    objective = Answering(LossConfig(), SPEC.model_copy(update={"tasks": SPEC.tasks[:1]}))
    hidden = net.trunk(batch)
    loss = loss_of(objective(net, batch), objective.counts(batch))
    gradient = torch.autograd.grad(loss, list(net.parameters()))
    return [x.detach().double() for x in (hidden, loss, torch.cat([g.flatten().double() for g in gradient]))]
