"""The small models: nothing leaks between records, generation equals the full pass, and they learn what they should."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from mmlm.config import parse
from mmlm.data.collate import collate, pack
from mmlm.data.modalities import keep_modalities
from mmlm.errors import ConfigError
from mmlm.features.sample import Sample
from mmlm.features.spec import ANSWER, AUDIO, BOS, EOS, IMAGE, FeatureSpec, TaskSpec
from mmlm.model.baseline_config import CONFIGS, CnnConfig
from mmlm.model.config import ModelConfig
from mmlm.model.flops import Shape, forward_flops, training_flops
from mmlm.model.generation import generate
from mmlm.model.generation_config import GenerationConfig
from mmlm.model.sampling import words_only
from mmlm.model.transformer import FusedTransformer
from mmlm.train import weights
from mmlm.train.config import LossConfig, TrainConfig
from mmlm.train.objectives import Answering, loss_of
from tests.small import SPEC, sample

CLASSES = SPEC.model_copy(update={"tasks": [TaskSpec(name="kind", labels=["a", "b", "c"])]})
Kind = Literal["lstm", "gru", "cnn"]
KINDS: list[Kind] = ["lstm", "gru", "cnn"]


def model(kind: Kind, **changes: Any) -> tuple[FusedTransformer, FeatureSpec]:
    torch.manual_seed(0)
    if kind == "cnn":
        return weights.build(CnnConfig(channels=(8, 16), width=32), CLASSES).eval(), CLASSES
    return weights.build(CONFIGS[kind](width=32, **changes), SPEC).eval(), SPEC


def several() -> list[Sample]:
    return [sample(i) for i in range(3)] + [sample(9, ()), sample(10, ("image",)), sample(11, ("audio", "fields"))]


@pytest.mark.parametrize("kind", KINDS)
def test_packed_and_padded_records_are_as_records_alone(kind: Kind):
    net, spec = model(kind)
    samples = several()
    alone = torch.cat([net(collate([s], spec)).label_RC for s in samples])
    assert torch.allclose(net(collate(samples, spec)).label_RC, alone, atol=1e-5)
    assert torch.allclose(net(pack([samples[:2], samples[2:5], samples[5:]], spec)).label_RC, alone, atol=1e-5)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_answers_of_packed_records_are_those_of_records_alone(kind: Kind):
    net, spec = model(kind)
    samples = several()
    alone = torch.cat([net(collate([s], spec)).answer_AV for s in samples])
    assert torch.allclose(net(pack([samples[:3], samples[3:]], spec)).answer_AV, alone, atol=1e-5)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_generation_with_a_kept_state_equals_the_full_pass(kind: Kind):
    net, spec = model(kind)
    samples = several()
    answers = generate(net, collate(samples, spec, pad_left=True, with_answer=False), limit=6)
    assert any(answers.ids)
    for one, ids, total, logits in zip(samples, answers.ids, answers.log_score_R, answers.label_RC, strict=True):
        full = dataclasses.replace(one, tokens=np.array([*one.tokens[: one.answer_at + 1], *ids, EOS], np.int32))
        out = net(collate([full], spec))
        log = words_only(out.answer_AV).log_softmax(-1)
        count = min(len(ids) + 1, 6)
        assert log.argmax(-1).tolist()[: len(ids)] == ids
        assert log.max(-1).values[:count].sum().item() == pytest.approx(total.item(), abs=1e-4)
        assert torch.allclose(out.label_RC[0], logits, atol=1e-5)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_a_beam_of_one_record_does_not_depend_on_the_others(kind: Kind):
    net, spec = model(kind)
    samples, config = several(), GenerationConfig(beams=3)
    together = generate(net, collate(samples, spec, pad_left=True, with_answer=False), 6, config)
    for n, one in enumerate(samples):
        alone = generate(net, collate([one], spec, pad_left=True, with_answer=False), 6, config)
        assert alone.ids[0] == together.ids[n]
        assert alone.log_score_R[0].item() == pytest.approx(together.log_score_R[n].item(), abs=1e-4)


def test_several_pictures_count_alike_and_padding_of_pictures_may_be_left_out():
    net, spec = model("cnn")
    one, other = sample(1, ("image",)), sample(2, ("image",))
    both = dataclasses.replace(one, tokens=np.insert(one.tokens, 1, IMAGE), answer_at=one.answer_at + 1)
    both.images = [*one.images, *other.images]
    turned = dataclasses.replace(both, images=both.images[::-1])
    out = net(collate([both, turned, one], spec)).label_RC
    assert torch.allclose(out[0], out[1], atol=1e-5) and not torch.allclose(out[0], out[2], atol=1e-3)
    assert spec.image is not None
    wide = dataclasses.replace(one, images=[one.images[0].copy()])
    wide.images[0][:4], wide.images[0][12:] = 255, 255
    tall = spec.image.model_copy(update={"patch": 4, "padding": "drop"})
    small = spec.model_copy(update={"image": tall})
    torch.manual_seed(0)
    pruned = weights.build(CnnConfig(channels=(8, 16), width=32), small).eval()
    batch = collate([wide, one], small)
    assert len(batch.patches_PD) == 8 + 16
    alone = torch.cat([pruned(collate([s], small)).label_RC for s in (wide, one)])
    assert torch.allclose(pruned(batch).label_RC, alone, atol=1e-5)


def test_a_cnn_answers_prompts_as_it_was_trained():
    net, spec = model("cnn")
    samples = several()
    answers = generate(net, collate(samples, spec, pad_left=True, with_answer=False), limit=0)
    assert torch.allclose(answers.label_RC, net(collate(samples, spec)).label_RC, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_every_modality_reaches_the_class_head(kind: Kind):
    net, spec = model(kind)
    full = sample(3)
    whole = net(collate([full], spec)).label_RC
    for name in set(full.modalities) - ({"context"} if kind == "cnn" else set()):
        without = net(collate([keep_modalities(full, set(full.modalities) - {name})], spec)).label_RC
        assert not torch.allclose(whole, without, atol=1e-4), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("given", [(), ("audio",)])
def test_every_parameter_has_a_gradient_whatever_is_missing(kind: Kind, given: tuple[str, ...]):
    net, spec = model(kind)
    net.train()
    out = net(collate([sample(i, given) for i in range(3)], spec), z_loss=0.0)
    assert out.answer is not None
    (out.answer.sum + out.label_RC.square().sum()).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name  # ZeRO needs a gradient of every parameter on every rank
    assert net.image is not None
    assert not any(p.grad.any() for p in net.image.parameters() if p.grad is not None)


def test_a_cnn_sees_the_picture_that_the_patches_were_cut_from():
    net, _ = model("cnn")
    one = sample(2, ("image",))
    seen: list[torch.Tensor] = []
    assert net.image is not None
    stage: Any = net.image.stages  # type: ignore[union-attr]
    stage[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    net(collate([one], CLASSES))
    picture = one.images[0].astype(np.float32)[..., 0]
    standard = (picture - picture.mean()) / (picture.std() + 0.255)
    assert np.allclose(seen[0][0, 0].numpy(), standard, atol=1e-4)


def test_recomputing_layers_changes_nothing():
    gradients = []
    for every in (0, 1):
        net, spec = model("lstm", dropout=0.0)
        net.train().set_up(recompute=every)
        out = net(collate(several(), spec), z_loss=0.0)
        assert out.answer is not None
        (out.answer.sum + out.label_RC.square().sum()).backward()
        gradients.append([p.grad for p in net.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_what_a_cnn_cannot_do_is_refused_by_name():
    with pytest.raises(ConfigError, match="task `kind`, whose answers are texts"):
        weights.build(CnnConfig(), SPEC)
    with pytest.raises(ConfigError, match="without pictures and sounds"):
        weights.build(CnnConfig(), CLASSES.model_copy(update={"image": None, "audio": None}))
    with pytest.raises(ConfigError, match="recompute"):
        model("cnn")[0].set_up(recompute=1)


def test_the_choice_is_by_kind_and_old_configs_mean_the_transformer():
    assert isinstance(parse(TrainConfig, {"model": {"width": 64, "heads": 2}}, "t").model, ModelConfig)
    assert parse(TrainConfig, {"model": {"kind": "gru", "width": 64}}, "t").model.kind == "gru"
    assert parse(TrainConfig, {"model": {"kind": "cnn"}}, "t").model == CnnConfig()
    with pytest.raises(ConfigError, match="did you mean `channels`"):
        parse(TrainConfig, {"model": {"kind": "cnn", "chanels": [8]}}, "t")
    with pytest.raises(ConfigError, match=r"rnn.*transformer"):
        parse(TrainConfig, {"model": {"kind": "rnn"}}, "t")


def test_flops_of_a_cnn_are_those_that_pytorch_counts():
    net, spec = model("cnn")
    config = CnnConfig(channels=(8, 16), width=32)
    batch = collate([sample(3, ("image",))] * 4, spec)
    shape = Shape.of(batch)
    # along go a picture of zeros, and a mel token of a sound, worth nothing
    assert spec.image is not None
    run = dataclasses.replace(shape, patches=shape.patches + 1, mels=1)
    net.train()
    with FlopCounterMode(display=False) as counter:
        net(batch)
    assert counter.get_total_flops() == forward_flops(config, spec, run)
    with FlopCounterMode(display=False) as counter:
        net(batch).label_RC.sum().backward()
    assert counter.get_total_flops() == training_flops(config, spec, run)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_flops_of_recurrent_layers_are_those_of_their_maps(kind: Kind):
    net, spec = model(kind)
    config = CONFIGS[kind](width=32)
    batch = collate([sample(3)] * 4, spec)
    shape = Shape.of(batch)
    with torch.backends.mkldnn.flags(enabled=False), FlopCounterMode(display=False) as counter:
        net(batch)
    assert counter.get_total_flops() == forward_flops(config, spec, shape)


def learn(net: FusedTransformer, spec: FeatureSpec, make: Any, steps: int, rate: float = 4e-3) -> None:
    objective = Answering(LossConfig(), spec)
    optimizer = torch.optim.AdamW(net.train().parameters(), rate)
    for step in range(steps):
        batch = collate([make(1000 * step + i) for i in range(48)], spec)
        loss_of(objective(net, batch), objective.counts(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
    net.eval()


def seen_and_heard(seed: int) -> Sample:
    """Which of three corners is bright; in every second record, which mel bin is loud instead."""
    rng = np.random.default_rng(seed)
    right = int(rng.integers(3))
    picture = rng.integers(0, 120, (16, 16, 1)).astype(np.uint8)
    y, x = [(0, 0), (0, 12), (12, 12)][right]
    picture[y : y + 4, x : x + 4] += 130
    sound = rng.uniform(-6, -4, (int(rng.integers(8, 40)), 8)).astype(np.float16)
    sound[:, 1 + 2 * right] = -1
    slot = AUDIO if seed % 2 else IMAGE
    return Sample(
        f"s{seed}", "kind", np.array([BOS, slot, ANSWER, 20 + right, EOS], np.int32), 2,
        [picture] if slot == IMAGE else [], [sound] if slot == AUDIO else [], label="abc"[right],
    )  # fmt: skip


def test_a_cnn_learns_from_pictures_and_sounds():
    net, spec = model("cnn")
    learn(net, spec, seen_and_heard, 40)
    held = [seen_and_heard(10**6 + i) for i in range(90)]
    batch = collate(held, spec)
    right = net(batch).label_RC.argmax(-1) == batch.label_R
    assert right[0::2].float().mean() > 0.8 and right[1::2].float().mean() > 0.8  # chance is .33


def in_order(seed: int) -> Sample:
    """Three letters; the class is the first of them, the text is all three backwards."""
    rng = np.random.default_rng(seed)
    letters = rng.choice([20, 30, 40], 3)
    tokens = [BOS, *letters.tolist(), ANSWER, *letters[::-1].tolist(), EOS]
    return Sample(f"s{seed}", "kind", np.array(tokens, np.int32), 4, label="abc"[[20, 30, 40].index(letters[0])])


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_recurrent_models_learn_classes_and_texts_that_depend_on_the_order(kind: Kind):
    net, spec = model(kind, layers=1)
    learn(net, spec, in_order, 150, 1e-2)
    held = [in_order(10**6 + i) for i in range(60)]
    answers = generate(net, collate(held, spec, pad_left=True, with_answer=False), limit=5)
    texts = np.mean([ids == s.tokens[5:8].tolist() for s, ids in zip(held, answers.ids, strict=True)])
    labels = answers.label_RC.argmax(-1) == collate(held, spec).label_R
    assert texts > 0.8 and labels.float().mean() > 0.8  # chance is .04 and .33


def test_distilling_a_transformer_into_a_cnn_moves_the_cnn_towards_it():
    from mmlm.train.objectives import Distilling

    net, spec = model("cnn")
    torch.manual_seed(1)
    teacher = weights.build(ModelConfig(width=32, layers=1, heads=2), spec).eval()
    objective = Distilling(LossConfig(), spec, teacher, 2.0, 0.0)
    batch = collate(several(), spec)
    loss_of(objective(net.train(), batch), objective.counts(batch)).backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in net.parameters())
    assert F.normalize(net.label.weight.grad, dim=0).abs().sum() > 0  # type: ignore[arg-type]
