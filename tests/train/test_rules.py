"""Settings of training: which parameters are updated how, schedules, shares, the loss however a batch is cut."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch

from mmlm.config import parse
from mmlm.data.collate import IGNORE, Batch, collate, pack
from mmlm.errors import ConfigError
from mmlm.features.sample import Sample
from mmlm.features.spec import FIELDS
from mmlm.model.flops import NOTHING
from mmlm.train import engine, weights
from mmlm.train.config import TrainConfig, WsdConfig
from mmlm.train.groups import frozen, frozen_share, let_rest, parameter_groups
from mmlm.train.muon import orthogonal
from mmlm.train.objectives import Answering, loss_of
from mmlm.train.schedule import learning_rate
from mmlm.train.shares import Share, cut_each, cut_end_to_end
from mmlm.world import World
from tests.small import SPEC, sample

SMALL = {"model": {"width": 32, "layers": 2, "heads": 4, "attention": "prefix"}}


def config(**changes: Any) -> TrainConfig:
    return parse(TrainConfig, {**SMALL, **changes}, "test")


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return weights.build(config().model, SPEC)


def groups_of(**changes: Any) -> dict[str, dict[str, Any]]:
    """Parameter name → its group."""
    net = model()
    names = {id(p): n for n, p in net.named_parameters()}
    found = {names[id(p)]: g for g in parameter_groups(net, config(**changes)) for p in g["params"]}
    assert found.keys() == dict(net.named_parameters()).keys()
    return found


# groups


def test_only_matrices_of_linear_maps_decay():
    groups = groups_of(optimizer={"weight_decay": 0.3})
    decayed = {name for name, group in groups.items() if group["weight_decay"]}
    assert "blocks.0.attention.qkv.weight" in decayed and "image.project.weight" in decayed
    assert not [n for n in decayed if "norm" in n or "bias" in n or "tokens" in n or "place" in n]
    assert {groups[name]["weight_decay"] for name in decayed} == {0.3}


def test_muon_takes_the_hidden_matrices_and_adamw_the_rest():
    groups = groups_of(optimizer={"kind": "muon"})
    by_muon = {name for name, group in groups.items() if group["rule"] == "muon"}
    assert by_muon == {n for n in groups if n.startswith("blocks") and "norm" not in n}
    assert {g["rule"] for n, g in groups.items() if n not in by_muon} == {"adamw"}
    assert groups["blocks.1.attention.qkv.weight"]["parts"]["blocks.1.attention.qkv.weight"] == 4 + 2 * 2


def test_factors_and_freezing_go_by_module_and_by_pattern():
    groups = groups_of(
        lr_factors={"blocks.0": 0.5, "blocks": 0.25, "*.bias": 2.0},
        freeze=[{"modules": ["image", "*norm.weight"], "end": 9}, {"modules": ["image.place"], "start": 20}],
    )
    factors = {name: group["factor"] for name, group in groups.items()}
    assert factors["blocks.0.attention.out.weight"] == 0.5 and factors["blocks.1.attention.out.weight"] == 0.25
    assert factors["label.bias"] == 2.0 and factors["label.weight"] == 1.0
    assert groups["image.project.bias"]["spans"] == ((0, 9),) and groups["blocks.1.attention_norm.weight"]["spans"] == (
        (0, 9),
    )
    spans = groups["image.place.weight"]["spans"]
    assert [frozen(spans, step) for step in (0, 8, 9, 19, 20, 10**6)] == [True, True, False, False, True, True]


def test_groups_of_nearly_the_same_factor_have_names_of_their_own():
    groups = groups_of(lr_factors={"blocks.0": 0.1234567, "blocks.1": 0.1234568, "image": 0.1})
    names = {n: groups[n]["name"] for n in ("blocks.0.attention.out.weight", "blocks.1.attention.out.weight")}
    assert len(set(names.values())) == 2
    assert groups["image.project.weight"]["name"] == "adamw-decay-x0.1"


def test_a_pattern_that_fits_nothing_is_refused():
    for changes in ({"lr_factors": {"imag": 0.1}}, {"freeze": [{"modules": ["imag"]}]}):
        with pytest.raises(ConfigError, match=r"'imag', which fits no parameter.*such as `image`"):
            parameter_groups(model(), config(**changes))


def test_what_no_step_trains_is_in_no_group():
    net = model()
    freeze = [{"modules": ["blocks", "tokens"]}, {"modules": ["image"], "end": 9}, {"modules": ["audio"], "start": 1}]
    settings = config(freeze=freeze)
    resting = let_rest(net, settings)
    assert set(resting) == {n for n, _ in net.named_parameters() if n.startswith(("blocks.", "tokens."))}
    grouped = {id(p) for group in parameter_groups(net, settings) for p in group["params"]}
    assert grouped == {id(p) for n, p in net.named_parameters() if n not in resting}
    matrices = {n: m.weight.numel() for n, m in net.named_modules() if isinstance(m, torch.nn.Linear)}
    share = sum(size for n, size in matrices.items() if n.startswith("blocks.")) / sum(matrices.values())
    assert frozen_share(net).maps == pytest.approx(share) and frozen_share(model()) == NOTHING
    everything = config(freeze=[{"modules": ["*"]}])
    let_rest(net, everything)
    with pytest.raises(ConfigError, match="leaves no parameter to be trained"):
        parameter_groups(net, everything)


# config


def test_what_zero_cannot_do_is_refused_in_the_config():
    for zero, said in (
        ({"stage": 0, "offload_optimizer": True}, "offload_optimizer needs stage 1, 2 or 3, found 0"),
        ({"stage": 2, "offload_parameters": True}, "offload_parameters needs stage 3, found 2"),
        ({"stage": 4}, "stage"),
    ):
        with pytest.raises(ConfigError, match=said):
            config(zero=zero)
    with pytest.raises(ConfigError, match="sgd"):
        config(optimizer={"kind": "sgd"})
    with pytest.raises(ConfigError, match="momentum"):  # a key of another kind
        config(optimizer={"kind": "lion", "momentum": 0.9})
    with pytest.raises(ConfigError, match="together must not exceed 1"):
        config(schedule={"kind": "wsd", "warmup": 0.5, "decay": 0.6})


def test_what_would_do_nothing_or_harm_is_refused_in_the_config():
    for changes, said in (
        ({"freeze": [{"modules": ["image"], "start": 9, "end": 9}]}, "end 9 must come after start 9"),
        ({"lr_factors": {"image": -1.0}}, "lr_factors.image"),
        ({"keep_best": 3}, "keep_best needs validation.every"),
    ):
        with pytest.raises(ConfigError, match=said):
            config(**changes)
    config(keep_best=3, validation={"every": 5}, lr_factors={"image": 0}, freeze=[{"modules": ["image"], "end": 1}])


def test_deepspeeds_config_follows_from_ours_and_the_number_of_ranks():
    ours = config(zero={"stage": 3, "offload_optimizer": True}, precision="fp16", accumulate=2, data={"batch": 16})
    theirs = engine.deepspeed_config(ours, World(1, 4))
    assert theirs == engine.deepspeed_config(ours, World(0, 4)) == json.loads(json.dumps(theirs))
    assert theirs["train_micro_batch_size_per_gpu"] == 2 and theirs["gradient_accumulation_steps"] == 2
    assert theirs["zero_optimization"]["offload_optimizer"]["device"] == "cpu" and theirs["fp16"]["enabled"]


# schedule


def test_wsd_rises_stays_and_falls():
    rates = [learning_rate(s, 100, 2.0, WsdConfig(warmup=0.1, decay=0.3, floor=0.1)) for s in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (s + 1) for s in range(10)])
    assert rates[10:71] == [2.0] * 61
    assert all(a > b for a, b in itertools.pairwise(rates[70:]))
    assert rates[85] == pytest.approx(2.0 * (0.1 + 0.9 * (1 - 0.5**0.5))) and 0.2 < rates[99] < 0.25


# shares


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_shares_of_all_ranks_are_all_of_every_parameter(ranks: int):
    shapes = [("a", torch.Size((3, 4))), ("b", torch.Size((1,))), ("c", torch.Size((5, 2))), ("d", torch.Size((7,)))]
    wholes = [torch.randn(shape) for _, shape in shapes]
    part = -(-30 // ranks)
    pieces = [-(-shape.numel() // ranks) for _, shape in shapes]
    cuts = {
        "end to end": [cut_end_to_end(shapes, [0, 12, 13, 23], r * part, part) for r in range(ranks)],
        "each": [cut_each(shapes, pieces, r) for r in range(ranks)],
    }
    for runs_of_ranks in cuts.values():
        total = [torch.zeros_like(w) for w in wholes]
        for runs in runs_of_ranks:
            flat = torch.full((max(part, sum(pieces)),), float("nan"))
            share = Share(flat, {}, runs, spread=False)
            for i, whole in enumerate(wholes):
                share.put(flat, i, whole)
                assert share.holds(i) == (runs[i].elements > 0)
            for i, mine in share.wholes(flat):  # alone: zeros where others hold the parameter
                total[i] += mine
        assert all(torch.equal(a, b) for a, b in zip(total, wholes, strict=True))


# muon


@pytest.mark.parametrize("shape", [(24, 24), (16, 48), (48, 16)])
def test_orthogonal_flattens_the_singular_values(shape: tuple[int, int]):
    torch.manual_seed(1)
    matrix = torch.randn(shape)
    made = orthogonal(matrix, 5, torch.float32)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    values = torch.linalg.svdvals(made) / (0.2 * max(shape) ** 0.5)
    assert values.min() > 0.6 and values.max() < 1.3
    assert torch.nn.functional.cosine_similarity((u @ v).flatten(), made.flatten(), 0) > 0.97
    assert made.square().mean().sqrt() == pytest.approx(0.2, rel=0.25)  # as large as an update of AdamW
    stacked = orthogonal(torch.cat([matrix, 5 * matrix]), 5, torch.float32, parts=2)
    assert torch.allclose(stacked[: shape[0]], made, atol=1e-5) and torch.allclose(stacked[shape[0] :], made, atol=1e-5)


# the loss


def test_the_loss_and_its_gradient_do_not_depend_on_packing_or_cutting():
    samples = [sample(i, given) for i, given in enumerate([("image", "audio"), (), ("fields",), ("audio", "context")])]
    samples.append(Sample("piece", "free", samples[0].tokens[samples[0].tokens > FIELDS], answer_at=-1))
    samples[1].label = None
    ways: dict[str, list[Batch]] = {
        "one batch": [collate(samples, SPEC)],
        "packed": [pack([samples[:2], samples[2:]], SPEC)],
        "packed to a length": [pack([samples[3:], samples[:3]], SPEC, length=96)],
        "micro-batches": [collate([s], SPEC) for s in samples],
        "packed micro-batches": [pack([samples[2:]], SPEC), pack([samples[:2]], SPEC)],
    }
    objective = Answering(config(loss={"z": 0.01}).loss, SPEC)
    found = {}
    for way, batches in ways.items():
        net = model()
        counts = {n: sum(objective.counts(b)[n] for b in batches) for n in objective.names}
        parts = [loss_of(objective(net, b), counts) for b in batches]
        total = torch.stack(parts).sum()
        total.backward()
        found[way] = (
            total.item(),
            torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]),
            counts,
        )
    loss, gradient, counts = found["one batch"]
    assert counts["label"] == 3 and counts["z"] == counts["answer"] > 10
    for way, (other, its, same) in found.items():
        assert other == pytest.approx(loss, rel=1e-6) and same == counts, way
        assert float((its - gradient).norm() / gradient.norm()) < 1e-5, way


def test_the_z_loss_is_the_mean_square_of_log_z():
    batch = collate([sample(i) for i in range(5)], SPEC)
    gradients, losses = [], []
    for objective in (Answering(config(loss={"z": 0.1, "label": 0.0}).loss, SPEC), None):
        net = model()
        if objective:
            loss = loss_of(objective(net, batch), objective.counts(batch))
        else:
            logits_AV = net(batch).answer_AV
            answer = torch.nn.functional.cross_entropy(logits_AV, batch.target_BT[batch.target_BT != IGNORE])
            loss = answer + 0.1 * logits_AV.exp().sum(-1).log().square().mean()
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for n, p in net.named_parameters() if "label" not in n]))  # type: ignore
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert float((gradients[0] - gradients[1]).norm() / gradients[1].norm()) < 1e-5


def test_terms_give_the_loss_of_each_item():
    batch, net = collate([sample(i) for i in range(3)], SPEC), model()
    terms = Answering(config(loss={"answer": 2.0}).loss, SPEC)(net, batch)
    output = net(batch)
    log = output.answer_AV.log_softmax(-1)
    expected = -log[torch.arange(len(log)), batch.target_BT[batch.target_BT != IGNORE]]
    assert torch.allclose(terms["answer"].each, expected, atol=1e-5)  # type: ignore[arg-type]
    assert terms["answer"].sum.item() == pytest.approx(expected.sum().item(), rel=1e-5)
    assert terms["label"].each is not None and len(terms["label"].each) == 3
    assert (terms["label"].weight, terms["answer"].weight) == (1.0, 2.0)


def test_a_batch_without_targets_or_labels_has_a_loss_of_zero_and_all_gradients():
    one = sample(3, ())
    one.tokens, one.label = one.tokens[: one.answer_at + 1], None
    net, objective = model(), Answering(config().loss, SPEC)
    batch = collate([one], SPEC)
    loss = loss_of(objective(net, batch), objective.counts(batch))
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in net.parameters())
