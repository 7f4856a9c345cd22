"""Every fusion against itself computed another way, and against what its paper says."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from mmlm.config import parse
from mmlm.data.collate import Batch, collate, field_rows, pack
from mmlm.data.modalities import keep_modalities
from mmlm.errors import ConfigError
from mmlm.features.sample import Sample
from mmlm.features.spec import AUDIO, EOS, FIELDS, IMAGE, FeatureSpec
from mmlm.model.adversary import reversal
from mmlm.model.config import ModelConfig
from mmlm.model.generation import generate, words_only
from mmlm.model.layouts import read_by
from mmlm.model.streams import part_of
from mmlm.model.transformer import FusedTransformer
from mmlm.train import weights
from mmlm.train.config import LossConfig
from mmlm.train.objectives import Answering
from tests.model.test_packing import GIVEN, piece
from tests.small import SPEC, sample

FUSIONS = ["concat", "add", "cross_attention", "adversarial", "late"]


def model(fusion: Any, spec: FeatureSpec = SPEC, **changes: Any) -> FusedTransformer:
    torch.manual_seed(0)
    sizes = {"width": 32, "layers": 2, "heads": 4, "attention": "prefix", **changes}
    net = FusedTransformer(parse(ModelConfig, {**sizes, "fusion": fusion}, "test"), spec, len(field_rows(spec)))
    for name, parameter in net.named_parameters():
        if name.endswith("gates"):  # they may begin shut
            parameter.data.normal_()
    return net.eval()


def losses_and_gradients(
    net: FusedTransformer, batches: list[Batch], spec: FeatureSpec = SPEC, of: tuple[str, ...] = ()
) -> tuple[dict[str, float], dict[str, Any]]:
    """Sums over all batches; a gradient of each parameter, None where it was not touched. `of`: those terms only."""
    net.zero_grad()
    sums: dict[str, float] = {}
    for batch in batches:
        terms = Answering(LossConfig(), spec, net.config)(net, batch)
        terms = {name: terms[name] for name in of or terms}
        torch.stack([term.sum for term in terms.values()]).sum().backward()
        for name, term in terms.items():
            sums[name] = sums.get(name, 0.0) + term.sum.item()
    return sums, {name: p.grad for name, p in net.named_parameters()}


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("attention", ["causal", "prefix"])
@pytest.mark.parametrize("given", GIVEN)
def test_packed_equals_each_record_alone(fusion: str, attention: str, given: str):
    net = model(fusion, attention=attention)
    samples = [sample(i, g, task=("kind", "free")[i % 2]) for i, g in enumerate(GIVEN[given])]
    samples.insert(2, piece(7, 19))
    packed = pack([samples[:3], samples[3:5], samples[5:]], SPEC, 96)
    alone = [collate([s], SPEC) for s in samples]
    assert torch.allclose(net.trunk(packed), torch.cat([net.trunk(b) for b in alone]), atol=1e-5)
    one, other = losses_and_gradients(net, [packed]), losses_and_gradients(net, alone)
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    for name, gradient in one[1].items():
        assert gradient is not None, name  # ZeRO needs one of every parameter on every rank
        assert torch.allclose(gradient, other[1][name], atol=1e-4), name


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_number_that_is_none_stays_in_its_record(fusion: str):
    net = model(fusion)
    samples = [sample(i) for i in range(3)]
    batch = pack([samples], SPEC, 96)
    clean = net(batch).label_RC
    batch.patches_PD[4:8], batch.mels_MD[-1] = torch.nan, torch.nan  # the second picture, the last sound
    broken = net(batch).label_RC
    assert torch.equal(broken[0], clean[0]) and broken[1:].isnan().all()


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("away", ["image", "audio", "fields"])
def test_a_missing_modality_gives_the_gradients_of_a_model_without_it(fusion: str, away: str):
    """The records lack it; the other model has never heard of it, and shares all other weights. (The discriminator of
    adversarial fusion is asked among one kind more; what it turns round is no part of the comparison.)"""
    kept = {"image", "audio", "fields", "context"} - {away}
    samples = [keep_modalities(sample(i), kept) for i in range(3)]
    without = SPEC.model_copy(update={away: None})
    whole, part = model(fusion), model(fusion, without)
    named = dict(whole.named_parameters())
    part.load_state_dict({n: cut(named[m].detach(), fusion, away) for n, m in counterparts(whole, part, away).items()})
    one = losses_and_gradients(whole, [collate(samples, SPEC)], of=("answer", "label"))
    other = losses_and_gradients(part, [collate(samples, without)], without, of=("answer", "label"))
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    shared = counterparts(whole, part, away)
    for name, twin in shared.items():
        if other[1][name] is None:
            assert one[1][twin] is None and name.startswith("fusion.discriminator"), name
            continue
        assert torch.allclose(cut(one[1][twin], fusion, away), other[1][name], atol=1e-5), name
    for name in one[1].keys() - shared.values():
        assert not one[1][name].any(), name


def counterparts(whole: FusedTransformer, part: FusedTransformer, away: str) -> dict[str, str]:
    """Parameter of the model without a modality → the one of the model with it. Experts are numbered."""
    found = {}
    for name, _ in part.named_parameters():
        found[name] = name
        for beginning, experts, each in (
            ("blocks.", ("text", *SPEC.modalities), 2),
            ("encoder.", ("text", *SPEC.modalities), 2),
            ("fusion.norms.", SPEC.modalities, 1),
            ("norms.", SPEC.modalities, 1),
        ):
            if whole.fusion.trunks > 1 and name.startswith(beginning):
                number, _, rest = name.removeprefix(beginning).partition(".")
                later = int(number) >= experts.index(away) * each
                found[name] = f"{beginning}{int(number) + each * later}.{rest}"
    return found


def cut(tensor: torch.Tensor, fusion: str, away: str) -> torch.Tensor:
    """Without the columns of a head, or the row of the discriminator, that are of a modality."""
    number = 1 + SPEC.modalities.index(away)
    if fusion == "late" and tensor.shape[-1] == 4 * 32:
        return tensor.unflatten(-1, (4, 32))[:, [n for n in range(4) if n != number]].flatten(1)
    if fusion == "adversarial" and tensor.shape[0] == 4 and tensor.shape[-1] in (4, 64):
        return tensor[[n for n in range(4) if n != number]]
    return tensor


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("changes", [{}, {"attention": "causal", "kv_heads": 2, "qk_norm": True}])
def test_generation_with_cache_equals_full_forward(fusion: str, changes: dict[str, Any]):
    net = model(fusion, **changes)
    net.answer.weight.data[EOS] *= 3
    given: list[tuple[str, ...]] = [("image", "audio"), ("audio",), (), ("fields", "context"), ("image",), ("context",)]
    samples = [sample(i, g) for i, g in enumerate(given)]
    ids, score, label = generate(net, collate(samples, SPEC, pad_left=True, with_answer=False), limit=6)
    assert len({len(answer) for answer in ids}) > 1  # some leave the batch before others
    assert any(ids)
    for one, answer, total, logits in zip(samples, ids, score, label, strict=True):
        one.tokens = torch.tensor([*one.tokens[: one.answer_at + 1].tolist(), *answer, EOS]).numpy()
        out = net(collate([one], SPEC))
        log = words_only(out.answer_AV).log_softmax(-1)
        assert log.argmax(-1).tolist()[: len(answer)] == answer
        count = min(len(answer) + 1, 6)
        assert log.max(-1).values[:count].sum().item() == pytest.approx(total.item(), abs=1e-4)
        assert torch.allclose(out.label_RC[0], logits, atol=1e-5)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_modality_reaches_the_class_head(fusion: str):
    net, full = model(fusion), sample(3)
    whole = net(collate([full], SPEC)).label_RC
    for name in full.modalities:
        without = net(collate([keep_modalities(full, set(full.modalities) - {name})], SPEC)).label_RC
        assert not torch.allclose(whole, without, atol=1e-4), name


@pytest.mark.parametrize("fusion", FUSIONS)
def test_recomputing_blocks_changes_nothing(fusion: str):
    net = model(fusion, layers=3).train()
    batch = pack([[sample(0), sample(1, ())], [sample(2, ("audio",))]], SPEC, 96)
    plain = losses_and_gradients(net, [batch])
    plain = plain[0], {n: g.clone() for n, g in plain[1].items()}
    net.set_up(recompute=1)
    again = losses_and_gradients(net, [batch])
    assert plain[0] == again[0]
    for name, gradient in plain[1].items():
        assert torch.equal(gradient, again[1][name]), name


@pytest.mark.parametrize("fusion", FUSIONS)
def test_several_pictures_and_sounds_in_one_record(fusion: str):
    """Two pictures side by side, one after some words, in any order: packed as alone, and each one counts."""
    net, one, more = model(fusion), sample(0, ("image",)), sample(1, ("image", "audio"))
    one.tokens = torch.tensor([*one.tokens[:3], 4, 4, *one.tokens[3:]]).numpy()
    one.images, one.answer_at = one.images + [sample(n).images[0] for n in (5, 6)], one.answer_at + 2
    together = net(pack([[more, one, more]], SPEC, 96)).label_RC
    assert torch.allclose(together[1], net(collate([one], SPEC)).label_RC[0], atol=1e-5)
    for n in range(3):
        other = Sample(one.id, one.task, one.tokens, one.answer_at, list(one.images))
        other.images[n] = 255 - other.images[n]
        assert not torch.allclose(net(collate([other], SPEC)).label_RC[0], together[1], atol=1e-4), n


def test_the_mean_of_each_modality_is_added_to_the_text():
    """Equal to the text alone whose every embedding is moved by the encoders' means."""
    net, one = model("add"), sample(4, ("image", "audio"))
    batch = collate([one], SPEC)
    seen: list[torch.Tensor] = []
    for encoder in net.fusion.encoders.values():  # type: ignore[union-attr,operator]
        encoder.register_forward_hook(lambda m, i, out: seen.append(out.mean(0) if len(out) else out.sum(0)))
    whole = net(batch).label_RC
    assert [bool(s.any()) for s in seen] == [True, False, True]  # audio, fields, image
    bare = model("add", SPEC.model_copy(update={"image": None, "audio": None, "fields": None}))
    bare.load_state_dict({n: net.state_dict()[n] for n in bare.state_dict()})
    tags = keep_modalities(one, {"image", "audio"})
    tags.images, tags.sounds = [], []  # the slots stay as they are, one token each
    moved = sum(seen)
    bare.tokens.register_forward_hook(lambda m, i, out: out + moved)
    alone = bare(collate([tags], SPEC.model_copy(update={"image": None, "audio": None, "fields": None}))).label_RC
    assert torch.allclose(whole, alone, atol=1e-5)


def test_the_word_alone_is_the_kind_with_its_defaults():
    assert parse(ModelConfig, {"fusion": "add"}, "test") == parse(ModelConfig, {"fusion": {"kind": "add"}}, "test")
    assert parse(ModelConfig, {}, "test").fusion.kind == "concat"
    assert parse(ModelConfig, {"fusion": {"kind": "add", "layers": 2}}, "test").fusion.layers == 2  # type: ignore
    with pytest.raises(ConfigError, match=r"concat.*add"):
        parse(ModelConfig, {"fusion": "stir"}, "test")
    with pytest.raises(ConfigError, match=r"unknown key.*layer.*did you mean"):
        parse(ModelConfig, {"fusion": {"kind": "add", "layer": 2}}, "test")


def test_the_gradient_of_the_discriminator_is_turned_round_and_grows():
    assert reversal(0.0, 10.0) == 0
    assert reversal(0.5, 10.0) == pytest.approx(2 / (1 + 2.718281828**-5) - 1)
    assert all(a < b for a, b in itertools.pairwise(reversal(p / 10, 5.0) for p in range(11)))
    net = model({"kind": "adversarial", "weight": 1.0})
    samples = [sample(i, g) for i, g in enumerate([("image", "audio"), ("image",), ()])]
    batch = collate(samples, SPEC)
    objective = Answering(LossConfig(answer=0, label=0), SPEC, net.config)
    assert objective.counts(batch)["modality"] == 3 + 2 + 1  # three texts, two pictures, one sound
    gradients = {}
    for progress in (0.0, 0.3, 1.0):
        net.progress = progress
        term = objective(net, batch)["modality"]
        gradients[progress] = torch.autograd.grad(term.sum, [net.fusion.discriminator[0].weight, net.tokens.weight])  # type: ignore
    plain = torch.autograd.grad(cross_entropy_unturned(net, batch), [net.tokens.weight])[0]
    assert plain.abs().max() > 1e-3 and not gradients[0.0][1].any()
    for progress in (0.3, 1.0):
        assert torch.equal(gradients[progress][0], gradients[0.0][0])  # the discriminator learns as fast as ever
        assert torch.allclose(gradients[progress][1], -reversal(progress, 10.0) * plain, atol=1e-6)


def cross_entropy_unturned(net: FusedTransformer, batch: Batch) -> torch.Tensor:
    """The discriminator's loss, read off the input of the last block without any reversal, record by record."""
    entering: list[torch.Tensor] = []
    handle = net.reader.blocks[-1].register_forward_pre_hook(lambda m, inputs: entering.append(inputs[0]))
    net(batch)
    handle.remove()
    part = part_of(batch, read_by(net.config.layout, batch))
    tokens, prompt = part.tokens_BT[part.valid_BT], part.prompt_BT[part.valid_BT]
    record = part.valid_BT.nonzero()[:, 0]
    total = torch.zeros(())
    slots = {1: AUDIO, 2: FIELDS, 3: IMAGE}
    for r, kind in itertools.product(range(len(part.valid_BT)), range(4)):
        media = sum(((tokens == s) & prompt for s in slots.values()), torch.zeros_like(prompt))
        here = (record == r) & ((tokens == slots[kind]) & prompt if kind else ~media)
        if here.any():
            logits = net.fusion.discriminator(entering[0][here].mean(0))  # type: ignore[operator]
            total = total + F.cross_entropy(logits, torch.tensor(kind))
    return total


def test_experts_are_multiplied():
    """Against softmaxes in float64, expert by expert, each of which is shown its own modality alone."""
    net = model("late").double()
    net.label.bias.data.normal_()
    one = sample(2, ("image", "fields", "context"), task="kind")
    out = net(double(collate([one], SPEC)))
    product = {"label": torch.ones(1, 3).double(), "answer": torch.ones(len(out.answer_AV), 64).double()}
    for n, name in enumerate(("text", *SPEC.modalities)):
        if name == "audio":
            continue  # it has none: no factor
        alone = double(collate([keep_modalities(one, {name, "context"})], SPEC))
        hidden = net.trunk(alone)[:, 32 * n : 32 * n + 32]
        target = alone.target_BT[alone.valid_BT] != -100
        label = hidden[int(alone.answer_at_R[0])] @ net.label.weight[:, 32 * n : 32 * n + 32].T
        answer = hidden[target] @ net.answer.weight[:, 32 * n : 32 * n + 32].T
        product["label"] *= (label + net.label.bias * (n == 0)).softmax(-1)
        product["answer"] *= answer.softmax(-1)
    for name, logits in (("label", out.label_RC), ("answer", out.answer_AV)):
        wanted = product[name] / product[name].sum(-1, keepdim=True)
        assert torch.allclose(logits.softmax(-1), wanted, atol=1e-12), name


def double(batch: Batch) -> Batch:
    return batch._each(lambda t: t.double() if t.is_floating_point() else t)


def test_no_expert_sees_the_modality_of_another():
    net, one = model("late"), sample(3)
    before = net.trunk(collate([one], SPEC))
    one.images = [255 - one.images[0]]
    after = net.trunk(collate([one], SPEC))
    moved = (before != after).any(0).unflatten(0, (4, 32)).any(1).tolist()
    assert dict(zip(("text", *SPEC.modalities), moved, strict=True)) == {
        "text": False, "audio": False, "fields": False, "image": True,
    }  # fmt: skip


def test_a_gated_layer_whose_gates_are_shut_changes_nothing():
    net, one = model({"kind": "cross_attention", "gate": 0.0}), sample(5)
    tags = keep_modalities(one, {"context"})
    for layer in net.fusion.layers:  # type: ignore[union-attr]
        layer.gates.data.zero_()
    shut = net(collate([one], SPEC)).label_RC
    one.images, one.sounds = [255 - one.images[0]], [-6 - one.sounds[0]]
    assert torch.equal(net(collate([one], SPEC)).label_RC, shut)
    for layer in net.fusion.layers:  # type: ignore[union-attr]
        layer.gates.data.fill_(0.5)
    assert not torch.allclose(net(collate([one], SPEC)).label_RC, shut, atol=1e-4)
    assert net(collate([tags], SPEC)).label_RC.isfinite().all()


@pytest.mark.parametrize(
    "form", [*({"fusion": {"kind": f}} for f in FUSIONS), {"layout": "encoder"}, {"layout": "encoder_decoder"}], ids=str
)
def test_vectors_are_those_of_records_alone_in_every_form(form: dict[str, Any]):
    torch.manual_seed(0)
    spec = SPEC.model_copy(update={"tasks": SPEC.tasks[:1]})
    net = weights.build(ModelConfig(width=32, layers=2, heads=4, attention="prefix", embedding=8, **form), spec).eval()
    records = [
        sample(i, given)
        for i, given in enumerate([("image", "audio"), ("audio",), (), ("fields", "context"), ("image",)])
    ]
    together = net(pack([records[:3], records[3:]], spec)).embedding_RE
    each = [net(collate([one], spec)).embedding_RE for one in records]
    assert together is not None and all(one is not None for one in each)
    torch.testing.assert_close(together, torch.cat([one for one in each if one is not None]), atol=1e-5, rtol=0)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(len(records)))


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_spec_of_text_alone_will_do(fusion: str):
    bare = SPEC.model_copy(update={"image": None, "audio": None, "fields": None})
    net = model(fusion, bare)
    samples = [keep_modalities(sample(i), {"context"}) for i in range(2)]
    assert net(pack([samples], bare, 96)).label_RC.shape == (2, 3)
    assert generate(net, collate(samples, bare, pad_left=True, with_answer=False), limit=3).label_RC.isfinite().all()
