"""Initialisation: what the formulas say of the spread of weights, and the coordinate check of muP."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from mmlm.data.collate import collate
from mmlm.model.config import ModelConfig
from mmlm.train import weights
from mmlm.train.config import LoopConfig
from mmlm.train.groups import parameter_groups
from mmlm.train.objectives import Answering, loss_of
from tests.small import SPEC, sample

WIDTHS = (64, 128, 256)


def build(width: int, kind: str, **changes: Any) -> Any:
    """Four heads whatever the width, so that heads widen, too."""
    torch.manual_seed(0)
    chosen: dict[str, Any] = {"kind": kind, **({"base_width": 64, "base_head_width": 16} if kind == "mup" else {})}
    fields = {"width": width, "layers": 3, "heads": 4, "initialisation": chosen, **changes}
    return weights.build(ModelConfig(**fields), SPEC)


def test_weights_are_spread_as_said():
    for kind, m in (("depth", 1), ("mup", 4)):
        net = build(256, kind)
        block = net.blocks[1]
        for weight, std in (
            (block.attention.qkv.weight, 256**-0.5), (block.attention.out.weight, (256 * 6) ** -0.5),
            (block.feed_forward.out.weight, (block.feed_forward.out.in_features * 6) ** -0.5),
            (net.answer.weight, 0.02 / m), (net.tokens.weight, 0.5), (net.image.project.weight, 64**-0.5),
        ):  # fmt: skip
            assert weight.std().item() == pytest.approx(std, rel=0.05)


def test_rates_fall_with_the_width_where_sums_run_over_it():
    net = build(256, "mup")
    names = {id(p): n for n, p in net.named_parameters()}
    for optimizer, hidden in (("adamw", 1 / 4), ("lion", 1 / 4), ("muon", 1 / 2)):
        config = LoopConfig.model_validate({"optimizer": {"kind": optimizer}, "lr_factors": {"answer": 2.0}})
        factors = {names[id(p)]: g["factor"] for g in parameter_groups(net, config) for p in g["params"]}
        assert factors["blocks.0.attention.qkv.weight"] == factors["blocks.2.feed_forward.out.weight"] == hidden
        assert factors["answer.weight"] == 2 / 4 and factors["label.weight"] == 1 / 4
        kept = ("tokens.weight", "image.project.weight", "label.bias", "norm.weight", "blocks.0.attention_norm.weight")
        assert {factors[name] for name in kept} == {1.0}


def test_at_its_base_mup_is_the_other():
    for a, b in zip(build(64, "depth").parameters(), build(64, "mup").parameters(), strict=True):
        assert torch.equal(a, b)
    batch = collate([sample(i) for i in range(3)], SPEC)
    assert torch.equal(build(64, "depth")(batch).label_RC, build(64, "mup")(batch).label_RC)


def changes_after(width: int, kind: str, steps: int = 4, **model: Any) -> dict[str, float]:
    """Root mean square of how much each part's output changed in some steps of Adam."""
    net, config = build(width, kind, **model), LoopConfig.model_validate({"optimizer": {"lr": 0.01}})
    batch, objective = collate([sample(i) for i in range(8)], SPEC), Answering(config.loss, SPEC)
    seen: list[dict[str, torch.Tensor]] = []

    def look() -> None:
        found: dict[str, torch.Tensor] = {}
        hooks = [
            part.register_forward_hook(lambda _, __, out, name=name: found.__setitem__(name, out.detach().clone()))
            for name, part in [(f"block {n}", block) for n, block in enumerate(net.blocks)]
        ]
        with torch.no_grad():
            out = net(batch)
        seen.append({**found, "answer": out.answer_AV, "label": out.label_RC})
        for hook in hooks:
            hook.remove()

    look()
    groups = [{"params": g["params"], "lr": 0.01 * g["factor"]} for g in parameter_groups(net, config)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(objective(net, batch), objective.counts(batch)).backward()
        optimizer.step()
    look()
    return {name: (seen[1][name] - seen[0][name]).square().mean().sqrt().item() for name in seen[0]}


def slopes(kind: str, widths: tuple[int, ...] = WIDTHS, **model: Any) -> dict[str, float]:
    """By what power of the width the changes grow: the slope of a line through their logarithms."""
    rows = [changes_after(width, kind, **model) for width in widths]
    x = torch.tensor([math.log(width) for width in widths])
    x = x - x.mean()
    return {
        name: float((x * torch.tensor([math.log(r[name]) for r in rows])).sum() / x.square().sum()) for name in rows[0]
    }


def test_coordinate_check():
    """Yang et al. 2022, appendix D.1: with muP no activation's change grows with the width; without, they do."""
    mup, plain = slopes("mup"), slopes("depth")
    assert max(mup.values()) < 0.15 and min(mup.values()) > -0.35
    assert plain["answer"] > 0.4 and plain["block 2"] > 0.3
