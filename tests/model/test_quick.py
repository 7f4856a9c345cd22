"""The maps of generation in bf16 against the library's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmlm.model import quick
from mmlm.model.cross_entropy import AnswerHead
from mmlm.model.quick import quick_maps


def nets() -> nn.ModuleDict:
    torch.manual_seed(0)
    maps = {"a": nn.Linear(64, 96, bias=False), "b": nn.Linear(64, 8), "head": AnswerHead(64, 300)}
    return nn.ModuleDict(maps).bfloat16()


@pytest.mark.parametrize("rows", [1, 2, 8, 33])
def test_quick_maps_give_the_same_to_the_last_bit_of_bf16(rows: int) -> None:
    net = nets()
    x = torch.randn(rows, 64, dtype=torch.bfloat16)
    with torch.inference_mode():
        wanted = {name: module(x) for name, module in net.items()}
        with quick_maps(net):
            for _ in range(5):  # before and after the weights are laid out anew
                found = {name: module(x) for name, module in net.items()}
        for name, y in wanted.items():
            assert torch.allclose(found[name], y, atol=2**-8, rtol=2**-7), name
    assert all("forward" not in module.__dict__ for module in net.modules())


def test_only_large_maps_without_bias_are_changed_and_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nets()
    with quick_maps(net):
        assert [name for name, m in net.items() if "forward" in m.__dict__] == ["a", "head"]
        first = net["a"].forward
        with quick_maps(net):
            assert net["a"].forward is first
        assert net["a"].forward is first, "the inner one leaves what it did not bring"
    with quick_maps(net.float()):
        assert not any("forward" in m.__dict__ for m in net.modules())
    monkeypatch.setattr(quick, "MOST", 1000)
    with quick_maps(net.bfloat16()):
        assert not any("forward" in m.__dict__ for m in net.modules())


def test_they_go_also_when_generation_fails() -> None:
    net = nets()
    with pytest.raises(RuntimeError), quick_maps(net):
        raise RuntimeError
    assert "forward" not in net["a"].__dict__
