"""Adapters on a model against the plain sum W + (alpha / rank) B A."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from mmlm.data.collate import IGNORE, collate, field_rows
from mmlm.errors import ConfigError
from mmlm.model import adapters
from mmlm.model.config import LoraConfig, ModelConfig
from mmlm.model.flops import Frozen, Shape, training_flops
from mmlm.model.transformer import FusedTransformer
from tests.small import SPEC, sample

pytest.importorskip("peft")
EVERYWHERE = LoraConfig(rank=3, alpha=6, targets=("blocks", "answer", "image"))


def model(lora: LoraConfig | None = EVERYWHERE, learnt: bool = True, tied: bool = False) -> FusedTransformer:
    torch.manual_seed(0)
    net = FusedTransformer(ModelConfig(width=32, layers=2, heads=4, tied=tied), SPEC, len(field_rows(SPEC))).eval()
    if lora:
        adapters.add(net, lora)
        adapters.freeze_base(net, lora)
        if learnt:
            _learn(net, 1)
    return net


def _learn(net: FusedTransformer, seed: int, name: str = adapters.DEFAULT) -> None:
    draw = torch.Generator().manual_seed(seed)
    for key, parameter in net.named_parameters():
        if adapters.is_adapter(key) and f".{name}." in key:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=draw)


def batch():
    return collate([sample(0), sample(1, ()), sample(2, ("audio",))], SPEC)


def test_an_adapter_is_a_sum_and_switched_off_it_is_nothing():
    bare, fresh, net = model(None), model(learnt=False), model()
    assert torch.equal(fresh(batch()).answer_AV, bare(batch()).answer_AV)
    by_hand = model(None)
    found = adapters.own_names(net.state_dict())
    with torch.no_grad():
        for name, parameter in by_hand.named_parameters():
            a = found.get(name.replace(".weight", ".lora_A.weight"))
            if a is not None:
                parameter.add_(6 / 3 * found[name.replace(".weight", ".lora_B.weight")] @ a)
    on, wanted = net(batch()), by_hand(batch())
    assert torch.allclose(on.answer_AV, wanted.answer_AV, atol=1e-5)
    assert torch.allclose(on.label_RC, wanted.label_RC, atol=1e-5)
    assert (on.answer_AV - bare(batch()).answer_AV).abs().max() > 0.1

    adapters.switch(net, None)
    assert torch.equal(net(batch()).answer_AV, bare(batch()).answer_AV)
    assert torch.equal(net(batch(), z_loss=0.0).answer.each_A, bare(batch(), z_loss=0.0).answer.each_A)
    adapters.switch(net, "default")
    assert torch.equal(net(batch()).answer_AV, on.answer_AV)

    adapters.merge(net)
    assert net.state_dict().keys() == bare.state_dict().keys() and not adapters.names(net)
    assert torch.allclose(net(batch()).answer_AV, on.answer_AV, atol=1e-5)


def test_vectors_keep_their_length_with_an_adapter_on_their_head():
    torch.manual_seed(0)
    net = FusedTransformer(ModelConfig(width=32, layers=1, heads=4, embedding=8), SPEC, len(field_rows(SPEC))).eval()
    bare = net(batch()).embedding_RE
    adapters.add(net, LoraConfig(rank=3, targets=("embedding",)))
    _learn(net, 1)
    with_it = net(batch()).embedding_RE
    adapters.merge(net)
    merged = net(batch()).embedding_RE
    assert bare is not None and with_it is not None and merged is not None
    torch.testing.assert_close(with_it, merged, atol=1e-6, rtol=0)
    torch.testing.assert_close(merged.norm(dim=1), torch.ones(len(merged)))
    assert not torch.allclose(with_it, bare, atol=1e-2)


def test_the_loss_of_an_adapted_head_has_the_gradients_of_its_logits():
    net = model()
    targets = batch().target_BT[batch().target_BT != IGNORE]
    trained = [p for n, p in net.named_parameters() if p.requires_grad and n.split(".")[0] in ("answer", "blocks")]
    asked, logits = net(batch(), z_loss=0.0).answer.sum, net(batch()).answer_AV
    wanted = F.cross_entropy(logits, targets, reduction="sum")
    assert asked.item() == pytest.approx(wanted.item(), rel=1e-6)
    pairs = zip(torch.autograd.grad(asked, trained), torch.autograd.grad(wanted, trained), strict=True)
    assert all(torch.allclose(a, b, atol=1e-5) and b.any() for a, b in pairs)


def test_only_adapters_and_what_a_pretrained_trunk_lacks_are_trained():
    net = model()
    free = {n for n, p in net.named_parameters() if p.requires_grad}
    held = {n for n, p in net.named_parameters() if not p.requires_grad}
    assert {"label.weight", "audio.place.weight", "blocks.0.attention.qkv.lora_A.default.weight"} <= free
    assert {"tokens.weight", "norm.weight", "blocks.0.attention.qkv.base_layer.weight"} <= held
    net = model(LoraConfig(targets=("*.qkv",), also=("tokens",)))
    free = {n.split(".")[-4 if "lora" in n else 0] for n, p in net.named_parameters() if p.requires_grad}
    assert free == {"qkv", "tokens"}


def test_the_flops_of_a_frozen_base_are_about_those_that_pytorch_counts():
    net = model(LoraConfig(rank=1, targets=("blocks",)))
    samples = [sample(i, ()) for i in range(8)]
    with FlopCounterMode(display=False) as counter:
        out = net(collate(samples, SPEC))
        (out.answer_AV.sum() + out.label_RC.sum()).backward()
    counted = counter.get_total_flops()
    shape = Shape.of(collate(samples, SPEC))
    assert training_flops(net.config, SPEC, shape, frozen=Frozen(1.0)) == pytest.approx(counted, rel=0.15)
    assert training_flops(net.config, SPEC, shape) > 1.25 * counted


def test_several_adapters_lie_on_one_model():
    net = model()
    first = net(batch())
    other = LoraConfig(rank=2, targets=("blocks.0",))
    adapters.add(net, other, "other")
    _learn(net, 2, "other")
    kept = adapters.own_names(net.state_dict(), "other") | {"label.bias": torch.ones(3)}
    adapters.load(net, kept, "other")
    second = net(batch())
    assert adapters.names(net) == ["default", "other"] and adapters.active(net) == "other"
    assert not torch.allclose(first.answer_AV, second.answer_AV, atol=1e-2)
    alone = model(None)
    adapters.add(alone, other, "other")
    adapters.load(alone, kept, "other")
    assert torch.equal(alone(batch()).label_RC, second.label_RC)
    adapters.switch(net, "default")
    assert torch.equal(net(batch()).answer_AV, first.answer_AV)


def test_no_adapter_leaves_anything_behind():
    """Each was trained along with other parts; a map that is such a part of one has the matrices of another on it."""
    one, two = LoraConfig(rank=2, targets=("blocks",)), LoraConfig(rank=2, targets=("blocks.1", "label"))
    random = torch.Generator().manual_seed(3)

    def kept(net: FusedTransformer, name: str, config: LoraConfig, *tops: str) -> dict[str, torch.Tensor]:
        adapters.add(net, config, name)
        _learn(net, len(name), name)
        state = net.state_dict()
        parts = {k: torch.randn(v.shape, generator=random) for k, v in state.items() if k.split(".")[0] in tops}
        return adapters.own_names(state, name) | {k: v for k, v in parts.items() if not adapters.is_adapter(k)}

    def answer(net: FusedTransformer) -> torch.Tensor:
        out = net(batch())
        return torch.cat([out.answer_AV.flatten(), out.label_RC.flatten()])

    net = model(None)
    wanted: dict[str | None, torch.Tensor] = {None: answer(model(None))}
    found = {"one": kept(model(None), "one", one, "label"), "three": kept(model(None), "three", two, "label", "image")}
    for name, config in (("one", one), ("three", two)):
        alone = model(None)
        for laid in (alone, net):
            adapters.add(laid, config, name)
            adapters.load(laid, found[name], name)
        wanted[name] = answer(alone)
    for asked in (None, "one", None, "three", "one", "three", None):
        adapters.switch(net, asked)
        assert torch.equal(answer(net), wanted[asked]), asked
    assert not any(torch.allclose(wanted[a], wanted[b], atol=1e-2) for a, b in ((None, "one"), ("one", "three")))
    assert "tokens.weight" not in getattr(net, adapters.PARTS)[None], "the whole base is not kept twice"
    adapters.switch(net, "one")
    adapters.merge(net)
    assert torch.allclose(answer(net), wanted["one"], atol=1e-5)


def test_what_cannot_be_adapted_is_said():
    with pytest.raises(ConfigError, match=r"`lora.targets` names 'heads', which fits no linear map.*such as blocks"):
        model(LoraConfig(targets=("heads",)))
    with pytest.raises(ConfigError, match="tied to the embedding"):
        model(tied=True)
    with pytest.raises(ConfigError, match=r"`lora.also` names 'video'"):
        model(LoraConfig(also=("video",)))
    with pytest.raises(ConfigError, match="no adapter 'x'; wanted default"):
        adapters.switch(model(), "x")
    with pytest.raises(ConfigError, match="lacks image"):
        adapters.load(model(), {}, "default")
