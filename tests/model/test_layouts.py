"""Layouts other than decoder-only, with every fusion, each against itself computed another way."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch

from mmlm.config import parse
from mmlm.data.collate import IGNORE, collate, pack
from mmlm.data.modalities import keep_modalities
from mmlm.errors import ConfigError
from mmlm.features.sample import Sample
from mmlm.features.spec import EOS, IMAGE
from mmlm.model.config import ModelConfig
from mmlm.model.generation import generate
from mmlm.model.layouts import read_by
from mmlm.model.sampling import words_only
from mmlm.train import weights
from mmlm.train.config import LossConfig
from mmlm.train.objectives import Answering, Distilling, loss_of
from tests.model.test_fusion import FUSIONS, counterparts, cross_entropy_unturned, cut
from tests.model.test_packing import piece
from tests.small import SPEC, sample

FORMS = [(layout, fusion) for layout in ("encoder", "encoder_decoder") for fusion in FUSIONS]
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
    config = parse(ModelConfig, {"width": 32, "layers": 2, "heads": 4, "layout": layout, **changes}, "test")
    net = weights.build(config, net_spec(layout)).eval()
    for name, parameter in net.named_parameters():
        if name.endswith("gates"):  # they may begin shut
            parameter.data.normal_()
    return net


def some() -> list[Sample]:
    return [sample(i, given) for i, given in enumerate([("image", "audio"), ("audio",), (), ("fields", "context")])]


def pieces() -> list[Sample]:
    """Of long records: one of text alone, one with a picture in its text."""
    text = piece(7, 19)
    tokens = np.insert(text.tokens, 4, IMAGE)
    return [piece(8, 9), dataclasses.replace(text, images=sample(0).images, tokens=tokens)]


@pytest.mark.parametrize(
    "changes",
    [
        {}, CLASSIC, {**CLASSIC, "positions": "learned", "encoder_layers": 3},
        *({"fusion": fusion, "encoder_layers": 3} for fusion in FUSIONS), {**CLASSIC, "fusion": "late"},
    ],
)  # fmt: skip
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


@pytest.mark.parametrize(("layout", "fusion"), FORMS)
def test_packed_is_alone_and_so_are_the_gradients(layout: str, fusion: str):
    net, samples = model(layout, fusion=fusion).double(), some()
    net.progress = 0.5
    samples[2:2] = pieces()
    made = []
    for batches in ([pack([samples[:3], samples[3:]], SPEC)], [collate([s], SPEC) for s in samples]):
        objective, net.training = Answering(LossConfig(), net_spec(layout), net.config), True
        counts = objective.counts(pack([samples], SPEC))
        loss = torch.stack([loss_of(objective(net, batch), counts) for batch in batches]).sum()
        made.append([loss, *torch.autograd.grad(loss, list(net.parameters()))])
    for a, b in zip(*made, strict=True):
        assert torch.allclose(a, b, atol=1e-9)


def net_spec(layout: str) -> Any:
    return CLASSES if layout == "encoder" else SPEC


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_class_encoder_sees_the_question_and_not_the_answer(fusion: str):
    net, one, other = model("encoder", fusion=fusion), sample(3), sample(3)
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
        ({"layout": "encoder_decoder", "fusion": "late", "tied": True}, "those of fusion late read every expert"),
        ({"tied": True, "initialisation": "mup"}, "two ends that learn at different rates"),
        ({"encoder_layers": 2}, "encoder_layers is a setting of layout encoder_decoder"),
    ):
        with pytest.raises(ConfigError, match=words):
            parse(ModelConfig, changes, "test")


@pytest.mark.parametrize(("layout", "fusion"), FORMS)
@pytest.mark.parametrize("given", [(), ("image",), None])
def test_every_parameter_has_a_gradient_whatever_a_batch_lacks(layout: str, fusion: str, given: tuple[str, ...] | None):
    """ZeRO needs one of every parameter on every rank. None: pieces of a long text, which has no question at all."""
    net = model(layout, fusion=fusion).train()
    samples = [sample(i, given or ()) for i in range(3)]
    if given is None:
        samples = [Sample(s.id, "free", s.tokens[s.tokens >= 9], answer_at=-1) for s in samples]
    objective = Answering(LossConfig(), net_spec(layout), net.config)
    batch = collate(samples, SPEC)
    loss_of(objective(net, batch), objective.counts(batch)).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        absent = ("audio", "fusion.encoders.audio", *(() if given else ("image", "fusion.encoders.image")))
        missing = name.startswith(absent)
        assert not missing or not parameter.grad.any(), name
    assert net.blocks[0].attention.qkv.weight.grad.any() == (layout == "encoder_decoder" or given is not None)


@pytest.mark.parametrize(("layout", "fusion"), FORMS)
@pytest.mark.parametrize("away", ["image", "audio", "fields"])
def test_a_missing_modality_gives_the_gradients_of_a_model_without_it(layout: str, fusion: str, away: str):
    """The records lack it; the other model has never heard of it, and shares all other weights. (As in test_fusion.py, what
    a discriminator of one kind more turns round is no part of the comparison.)"""
    samples = [keep_modalities(sample(i), {"image", "audio", "fields", "context"} - {away}) for i in range(3)]
    whole, knows = model(layout, fusion=fusion), net_spec(layout)
    without = knows.model_copy(update={away: None})
    part, named = weights.build(whole.config, without).eval(), dict(whole.named_parameters())
    shared = counterparts(whole, part, away)
    part.load_state_dict({n: cut(named[m].detach(), fusion, away) for n, m in shared.items()})
    made: list[tuple[float, dict[str, Any]]] = []
    for net, spec in ((whole, knows), (part, without)):
        objective, batch = Answering(LossConfig(), spec), collate(samples, spec)
        loss = loss_of(objective(net, batch), objective.counts(batch))
        loss.backward()
        made.append((loss.item(), {n: p.grad for n, p in net.named_parameters()}))
    (one, mine), (other, its) = made
    assert one == pytest.approx(other, rel=1e-6) and len(its) < len(mine)
    for name, twin in shared.items():
        if its[name] is None:
            assert mine[twin] is None and name.startswith("fusion.discriminator"), name
            continue
        assert torch.allclose(cut(mine[twin], fusion, away), its[name], atol=1e-6), name
    for name in mine.keys() - shared.values():
        assert not mine[name].any(), name


@pytest.mark.parametrize(("layout", "fusion"), FORMS)
def test_recomputing_blocks_changes_nothing(layout: str, fusion: str):
    made = []
    for settings in ({"recompute": 0}, {"recompute": 1}, {"recompute": 2, "granularity": "selective"}):
        net = model(layout, fusion=fusion, layers=3).train()
        net.set_up(**settings)  # type: ignore[arg-type]
        out = net(pack([some()[:3], some()[3:]], SPEC), z_loss=0.0)
        loss = out.answer.sum + out.label_RC.square().sum() + (out.modality.logits.sum() if out.modality else 0)
        made.append([loss.detach(), *torch.autograd.grad(loss, list(net.parameters()))])
    for whole, again, selected in zip(*made, strict=True):
        assert torch.equal(whole, again) and torch.equal(whole, selected)


@pytest.mark.parametrize(("layout", "fusion"), FORMS)
def test_hidden_states_stand_where_they_are_asked_for(layout: str, fusion: str):
    """Whatever is read, the rows are those of the whole."""
    net, batch = model(layout, fusion=fusion), pack([some()[:3], some()[3:] + pieces()], SPEC)
    whole = net.trunk(batch)
    assert whole.shape == (int(batch.valid_BT.sum()), net.fusion.width)
    prompt_X, source_X = batch.prompt_BT[batch.valid_BT], read_by("encoder_decoder", batch)[batch.valid_BT]
    for read_X in (torch.arange(len(whole)) % 3 == 0, batch.target_BT[batch.valid_BT] != IGNORE, source_X, ~prompt_X):
        assert torch.allclose(net.trunk(batch, read_X), whole[read_X], atol=1e-6)
    assert whole[prompt_X].any(1).all() and whole[~prompt_X].any() == (layout == "encoder_decoder")


@pytest.mark.parametrize("fusion", FUSIONS)
def test_what_a_layout_says_is_taught_to_another(fusion: str):
    """An encoder by an encoder-decoder, and the other way round; of itself a student has nothing to learn."""
    forms = {layout: model(layout, fusion=fusion) for layout in ("encoder", "encoder_decoder")}
    batch = collate(some(), CLASSES)
    for student, teacher in itertools.product(forms.values(), forms.values()):
        objective = Distilling(LossConfig(), CLASSES, teacher, 2.0, 0.5, student.config)
        terms = objective(student, batch)
        assert set(terms) == set(objective.names) and (("modality" in terms) == (fusion == "adversarial"))
        assert (terms["label_kl"].sum.item() < 1e-6) == (student is teacher)
        loss = loss_of(terms, objective.counts(batch))
        assert all(g is not None for g in torch.autograd.grad(loss, list(student.parameters())))


@pytest.mark.parametrize("layout", ["decoder", "encoder", "encoder_decoder"])
def test_a_discriminator_is_asked_of_what_the_layout_reads(layout: str):
    """As often as the loss counts; and its loss is that of the means of what enters the last of the blocks that read."""
    net, batch = model(layout, fusion="adversarial"), collate(some() + pieces(), SPEC)
    objective = Answering(LossConfig(answer=0, label=0), net_spec(layout), net.config)
    term = objective(net, batch)["modality"]
    counted = {"decoder": 4 + 4 + 2 + 1, "encoder": 4 + 4 + 1, "encoder_decoder": 4 + 4 + 1}[layout]
    assert objective.counts(batch)["modality"] == len(net(batch).modality.kind_Z) == counted
    assert term.sum.item() == pytest.approx(cross_entropy_unturned(net, batch).item(), rel=1e-5)
    net.progress = 1.0
    for name, gradient in zip(("tokens", "image"), torch.autograd.grad(objective(net, batch)["modality"].sum, [
        net.tokens.weight, net.image.project.weight,
    ]), strict=True):  # fmt: skip
        assert gradient.any(), name


def test_every_layout_has_experts_who_see_their_own_modality_alone():
    for layout in ("encoder", "encoder_decoder"):
        net, one = model(layout, fusion="late"), sample(3)
        at = int(collate([one], SPEC).answer_at_R[0])
        before = net.trunk(collate([one], SPEC))[at]
        one.images = [255 - one.images[0]]
        moved = (before != net.trunk(collate([one], SPEC))[at]).unflatten(0, (4, 32)).any(1).tolist()
        assert moved == [False, False, False, True], layout  # text, audio, fields, image
        none = net.trunk(collate([keep_modalities(one, {"audio"})], SPEC))
        factors = (
            none[int(collate([keep_modalities(one, {"audio"})], SPEC).answer_at_R[0])].unflatten(0, (4, 32)).any(1)
        )
        assert factors.tolist() == [True, True, False, False], layout


@pytest.mark.parametrize("fusion", ["add", "cross_attention"])
def test_a_decoder_asks_the_text_alone_where_media_have_come_to_it(fusion: str):
    """As many positions as the sequence of the fusion has: those of the text, and a tag for each run of slots."""
    net, asked = model("encoder_decoder", fusion=fusion), []
    net.blocks[0].across.key_value.register_forward_pre_hook(lambda m, inputs: asked.append(len(inputs[0])))
    one = sample(3)
    net(collate([one], SPEC))
    assert asked == [one.answer_at]  # every picture, sound and set of fields is one token there
