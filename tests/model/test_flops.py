"""The FLOP count against PyTorch's own counter of what was executed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmlm.data.collate import collate, pack
from mmlm.model.config import ModelConfig
from mmlm.model.flops import Shape, forward_flops, training_flops
from mmlm.train import weights
from tests.small import SPEC, sample

SIZES: dict[str, Any] = {"width": 32, "layers": 3, "heads": 4}
CONFIG = ModelConfig(**SIZES)


FUSED = ("add", {"kind": "cross_attention", "every": 2}, "adversarial", "late")
FORMS: list[dict[str, Any]] = [
    {}, {"kv_heads": 4, "qk_norm": False}, {"mlp": "relu", "norm": "layer", "positions": "learned"}, {"layout": "encoder"},
    {"layout": "encoder_decoder", "encoder_layers": 2}, *({"layout": "encoder", "fusion": f} for f in FUSED),
    *({"layout": "encoder_decoder", "encoder_layers": 2, "fusion": f} for f in FUSED),
    {"fusion": "add"}, {"fusion": {"kind": "add", "layers": 2}}, {"fusion": {"kind": "cross_attention", "every": 2}},
    {"fusion": "late"}, {"fusion": "adversarial"},
]  # fmt: skip


@pytest.mark.parametrize("config", [ModelConfig(**{**SIZES, **changes}) for changes in FORMS])
def test_flops_are_those_that_pytorch_counts(config: ModelConfig):
    torch.manual_seed(0)
    spec = SPEC.model_copy(update={"tasks": SPEC.tasks[:1]})  # those with classes
    net = weights.build(config, spec).double()  # the counter does not know the fused attention of float32
    batch = collate([sample(3)] * 4, SPEC)  # one length: nothing is padded
    shape = Shape.of(batch)
    with FlopCounterMode(display=False) as counter:
        net(batch)
    assert counter.get_total_flops() == forward_flops(config, spec, shape)
    with FlopCounterMode(display=False) as counter:
        out = net(batch)
        guessed = out.modality.logits.sum() if out.modality else 0
        (out.answer_AV.sum() + out.label_RC.sum() + guessed).backward()
    assert counter.get_total_flops() == training_flops(config, spec, shape)


def test_packing_and_padding_do_not_change_the_count():
    samples = [sample(i, g) for i, g in enumerate([("image",), (), ("audio",), ("fields",)])]
    packed, alone = Shape.of(pack([samples[:3], samples[3:]], SPEC, 96)), Shape.of(collate(samples, SPEC))
    assert packed == alone
    assert packed.tokens == sum(int(collate([s], SPEC).valid_BT.sum()) for s in samples)
    assert packed.answers == 4


def test_a_long_record_costs_its_square():
    config = ModelConfig(width=64, layers=2, heads=4)
    one, two = Shape((512,), targets=0), Shape((256, 256), targets=0)
    saved = forward_flops(config, SPEC, one) - forward_flops(config, SPEC, two)
    assert saved == 2 * 4 * 64 * (512**2 - 2 * 256**2)


def test_recomputation_adds_one_forward_pass_of_the_blocks():
    shape = Shape((100,), targets=0, read=100)
    once, twice = (training_flops(CONFIG, SPEC, shape, recomputed=r) for r in (False, True))
    assert twice / once == pytest.approx(4 / 3)
