"""Layouts other than decoder-only, each against itself computed another way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mmlm.config import parse
from mmlm.data.collate import IGNORE, collate, pack
from mmlm.data.modalities import keep_modalities
from mmlm.errors import ConfigError
from mmlm.features.sample import Sample
from mmlm.features.spec import EOS
from mmlm.model.config import ModelConfig
from mmlm.model.generation import generate
from mmlm.model.sampling import words_only
from mmlm.train import weights
from mmlm.train.config import LossConfig
from mmlm.train.objectives import Answering, loss_of
from tests.small import SPEC, sample

CLASSES = SPEC.model_copy(update={"tasks": SPEC.tasks[:1]})
CLASSIC = {
    "norm": "layer",
    "norm_at": "after",
    "mlp": "relu",
    "positions": "sinusoidal",
    "kv_heads": 4,
    "qk_norm": False,
}


def model(layout: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = ModelConfig(**{"width": 32, "layers": 2, "heads": 4, "layout": layout, **changes})
    return weights.build(config, CLASSES if layout == "encoder" else SPEC).eval()


def some() -> list[Sample]:
    return [sample(i, given) for i, given in enumerate([("image", "audio"), ("audio",), (), ("fields", "context")])]


@pytest.mark.parametrize("changes", [{}, CLASSIC, {**CLASSIC, "positions": "learned", "encoder_layers": 3}])
def test_an_encoder_decoder_generates_what_its_full_pass_says(changes: dict[str, Any]):
    net, samples = model("encoder_decoder", **changes), some()
    prompts = collate(samples, SPEC, pad_left=True, with_answer=False)
    first = generate(net, prompts, limit=6).ids
    with torch.no_grad():  # what one answer said late ends it, so that it leaves the batch before others
        net.answer.weight[EOS] = 1.1 * net.answer.weight[first[1][3]]
    ids, score, label = generate(net, prompts, limit=6)
    assert len({len(i) for i in ids}) > 1
    for one, answer, total, logits in zip(samples, ids, score, label, strict=True):
        one.tokens = np.array([*one.tokens[: one.answer_at + 1], *answer, EOS], np.int32)
        out = net(collate([one], SPEC))
        log = words_only(out.answer_AV).log_softmax(-1)
        assert log.argmax(-1).tolist()[: len(answer)] == answer
        assert log.max(-1).values[: min(len(answer) + 1, 6)].sum().item() == pytest.approx(total.item(), abs=1e-4)
        assert torch.allclose(out.label_RC[0], logits, atol=1e-5)


@pytest.mark.parametrize("layout", ["encoder", "encoder_decoder"])
def test_packed_is_alone_and_so_are_the_gradients(layout: str):
    net, samples = model(layout).double(), some()
    made = []
    for batches in ([pack([samples[:3], samples[3:]], SPEC)], [collate([s], SPEC) for s in samples]):
        objective, net.training = Answering(LossConfig(), net_spec(layout)), True
        counts = objective.counts(pack([samples], SPEC))
        loss = torch.stack([loss_of(objective(net, batch), counts) for batch in batches]).sum()
        made.append([loss, *torch.autograd.grad(loss, list(net.parameters()))])
    for a, b in zip(*made, strict=True):
        assert torch.allclose(a, b, atol=1e-9)


def net_spec(layout: str) -> Any:
    return CLASSES if layout == "encoder" else SPEC


def test_a_class_encoder_sees_the_question_and_not_the_answer():
    net, one, other = model("encoder"), sample(3), sample(3)
    other.tokens = other.tokens.copy()
    other.tokens[other.answer_at + 1] = (other.tokens[other.answer_at + 1] - 9 + 1) % 50 + 9
    assert torch.equal(net(collate([one], CLASSES)).label_RC, net(collate([other], CLASSES)).label_RC)
    whole = net(collate([one], CLASSES)).label_RC
    for name in one.modalities:
        without = net(collate([keep_modalities(one, set(one.modalities) - {name})], CLASSES)).label_RC
        assert not torch.allclose(whole, without, atol=1e-4), name
    _, _, label = generate(net, collate([one], CLASSES, pad_left=True, with_answer=False), limit=0)
    assert torch.allclose(label, whole, atol=1e-5)


def test_what_a_layout_cannot_do_is_refused():
    with pytest.raises(ConfigError, match="'free', which asks for text"):
        weights.build(ModelConfig(layout="encoder"), SPEC)
    for changes, words in (
        ({"layout": "encoder_decoder", "fusion": "add"}, "joins modalities by fusion concat only"),
        ({"tied": True, "initialisation": "mup"}, "two ends that learn at different rates"),
        ({"encoder_layers": 2}, "encoder_layers is a setting of layout encoder_decoder"),
    ):
        with pytest.raises(ConfigError, match=words):
            parse(ModelConfig, changes, "test")


@pytest.mark.parametrize("layout", ["encoder", "encoder_decoder"])
@pytest.mark.parametrize("given", [(), ("image",), None])
def test_every_parameter_has_a_gradient_whatever_a_batch_lacks(layout: str, given: tuple[str, ...] | None):
    """ZeRO needs one of every parameter on every rank. None: pieces of a long text, which has no question at all."""
    net = model(layout).train()
    samples = [sample(i, given or ()) for i in range(3)]
    if given is None:
        samples = [Sample(s.id, "free", s.tokens[s.tokens >= 9], answer_at=-1) for s in samples]
    objective = Answering(LossConfig(), net_spec(layout))
    batch = collate(samples, SPEC)
    loss_of(objective(net, batch), objective.counts(batch)).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        missing = name.startswith("audio") or (name.startswith("image") and not given)
        assert not missing or not parameter.grad.any(), name
    assert net.blocks[0].attention.qkv.weight.grad.any() == (layout == "encoder_decoder" or given is not None)


@pytest.mark.parametrize("layout", ["encoder", "encoder_decoder"])
@pytest.mark.parametrize("away", ["image", "audio", "fields"])
def test_a_missing_modality_gives_the_gradients_of_a_model_without_it(layout: str, away: str):
    """The records lack it; the other model has never heard of it, and shares all other weights."""
    samples = [keep_modalities(sample(i), {"image", "audio", "fields", "context"} - {away}) for i in range(3)]
    whole, knows = model(layout), net_spec(layout)
    without = knows.model_copy(update={away: None})
    part = weights.build(whole.config, without).eval()
    part.load_state_dict({n: t for n, t in whole.state_dict().items() if n in part.state_dict()})
    made: list[tuple[float, dict[str, Any]]] = []
    for net, spec in ((whole, knows), (part, without)):
        objective, batch = Answering(LossConfig(), spec), collate(samples, spec)
        loss = loss_of(objective(net, batch), objective.counts(batch))
        loss.backward()
        made.append((loss.item(), {n: p.grad for n, p in net.named_parameters()}))
    (one, mine), (other, its) = made
    assert one == pytest.approx(other, rel=1e-6) and set(its) < set(mine)
    for name, gradient in mine.items():
        assert torch.allclose(gradient, its[name], atol=1e-6) if name in its else not gradient.any(), name


@pytest.mark.parametrize("layout", ["encoder", "encoder_decoder"])
def test_recomputing_blocks_changes_nothing(layout: str):
    made = []
    for every in (0, 1):
        net = model(layout).train()
        net.set_up(recompute=every)
        out = net(collate(some(), SPEC), z_loss=0.0)
        loss = out.answer.sum + out.label_RC.square().sum()
        made.append([loss.detach(), *torch.autograd.grad(loss, list(net.parameters()))])
    for a, b in zip(*made, strict=True):
        assert torch.equal(a, b)


def test_hidden_states_stand_where_they_are_asked_for():
    """Whatever is read, the rows are those of the whole."""
    for layout in ("encoder", "encoder_decoder"):
        net, batch = model(layout), pack([some()[:3], some()[3:]], SPEC)
        whole = net.trunk(batch)
        assert whole.shape == (int(batch.valid_BT.sum()), 32)
        for read_X in (torch.arange(len(whole)) % 3 == 0, batch.target_BT[batch.valid_BT] != IGNORE):
            assert torch.allclose(net.trunk(batch, read_X), whole[read_X], atol=1e-6)
