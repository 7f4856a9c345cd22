"""Contrast: views against samples cut down, InfoNCE against its formula, and the same loss and gradients however it is cut."""

from __future__ import annotations

import itertools
import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmlm import world as worlds
from mmlm.artifacts import Artifact
from mmlm.config import parse
from mmlm.data.collate import Batch, collate, field_rows, pack
from mmlm.data.loader import Loader
from mmlm.data.modalities import alone
from mmlm.data.views import only_views, view, with_views
from mmlm.errors import ConfigError
from mmlm.evals.answer import Answerer
from mmlm.evals.config import EvaluateConfig
from mmlm.evals.embed import embed
from mmlm.evals.predictions import facts_of
from mmlm.evals.retrieval import ranks as places
from mmlm.evals.retrieval_rows import retrieval_rows
from mmlm.features import spec as feature_spec
from mmlm.features.config import TokenizerConfig
from mmlm.features.sample import Sample
from mmlm.features.spec import ANSWER, AUDIO, BOS, CONTEXT, EOS, IMAGE
from mmlm.features.text import train_tokenizer
from mmlm.launch.local import ranks
from mmlm.model.config import ModelConfig
from mmlm.model.flops import Shape, training_flops
from mmlm.model.transformer import FusedTransformer
from mmlm.train import engine, weights
from mmlm.train.config import ContrastiveConfig, LossConfig, TrainConfig
from mmlm.train.devices import Device
from mmlm.train.objectives import Answering, loss_of
from mmlm.train.planning import forecast
from mmlm.train.probe import workload
from mmlm.world import World
from tests.small import SPEC, sample

GIVEN = [
    ("image", "audio", "context"), ("image", "context"), ("audio", "fields"), ("image", "audio"), (), ("context",),
    ("image", "audio", "context"), ("audio", "context"),
]  # fmt: skip
LOSS = LossConfig(contrastive=ContrastiveConfig(weight=0.5, temperature=0.2))


def net(**changes: Any) -> FusedTransformer:
    torch.manual_seed(0)
    config = ModelConfig(**{"width": 32, "layers": 1, "heads": 2, "attention": "prefix", "embedding": 16, **changes})
    return FusedTransformer(config, SPEC, len(field_rows(SPEC)))


FIELDS_TOO = [
    ("image", "fields", "audio"), ("image", "fields"), ("audio", "fields"), ("image",), ("fields",), ("audio", "context"),
    ("image", "fields", "audio"), ("context", "fields"),
]  # fmt: skip
OF_FIELDS = ContrastiveConfig(
    between=(("image", "fields"), ("fields", "audio"), ("fields", "context")), weight=0.5, temperature=0.2
)


def samples(given: list[tuple[str, ...]] = GIVEN) -> list[Sample]:
    made = [sample(i, has, task="free" if i == 2 else "kind") for i, has in enumerate(given)]
    made[6].group = made[0].group  # the same thing twice
    return made


def embedded(model: FusedTransformer, one: Sample, modality: str) -> torch.Tensor:
    return model(collate([alone(one, {modality})], SPEC)).embedding_RE[0]  # type: ignore[index]


@pytest.mark.parametrize("modality", ["image", "audio", "fields", "context"])
def test_views_are_the_samples_with_one_modality_alone(modality: str):
    model = net()
    rows = samples()
    batch = pack([rows[:3], rows[3:]], SPEC, 128)
    views = [view(batch, modality)]
    having = [n for n, given in enumerate(GIVEN) if modality in given]
    assert views[0].record_V.tolist() == having
    found = model(only_views(batch, views)).embedding_RE
    wanted = torch.stack([embedded(model, rows[n], modality) for n in having])
    assert torch.allclose(found, wanted, atol=1e-5)
    assert torch.allclose(found.norm(dim=1), torch.ones(len(having)), atol=1e-6)
    whole = model(with_views(batch, views))
    assert torch.allclose(whole.embedding_RE[-len(having) :], wanted, atol=1e-5)
    assert torch.allclose(whole.label_RC[: len(rows)], model(batch).label_RC, atol=1e-5)


def info_nce(model: FusedTransformer, rows: list[Sample], config: ContrastiveConfig) -> torch.Tensor:
    """The sum over pairs of modalities, records and directions, written out."""
    total = torch.zeros(())
    for pair in config.between:
        for a, b in (pair, pair[::-1]):
            candidates = [n for n, row in enumerate(rows) if b in row.modalities]
            for n, given in enumerate(row.modalities for row in rows):
                if a in given and b in given:
                    others = [m for m in candidates if m == n or rows[m].group != rows[n].group]
                    z = embedded(model, rows[n], a)
                    score = torch.stack([z @ embedded(model, rows[m], b) for m in others]) / config.temperature
                    total = total - score.log_softmax(0)[others.index(n)] / 2
    return total


@pytest.mark.parametrize(
    ("config", "given", "pairs"),
    [(LOSS.contrastive, GIVEN, 3 + 3 + 3), (OF_FIELDS, FIELDS_TOO, 3 + 3 + 1)],
    ids=["media and texts", "with fields"],
)
def test_the_loss_is_its_formula_and_does_not_depend_on_micro_batches(
    config: ContrastiveConfig, given: list[tuple[str, ...]], pairs: int
):
    model, rows = net(), samples(given)
    wanted = info_nce(model, rows, config)
    wanted_gradient = torch.autograd.grad(wanted, list(model.parameters()), allow_unused=True)
    for sizes in ([8], [3, 5], [2, 1, 1, 4]):
        batches = [collate([rows[i] for i in part], SPEC) for part in torch.arange(8).split(sizes)]
        objective = Answering(LossConfig(contrastive=config), SPEC)
        assert sum(objective.counts(b)["contrastive"] for b in batches) == pairs
        objective.prepare(model, batches, torch.device("cpu"))
        model.zero_grad()
        total = torch.zeros(())
        for batch in batches:
            term = objective(model, batch)["contrastive"]
            term.sum.backward()
            total += term.sum.detach()
        assert total.item() == pytest.approx(wanted.item(), rel=1e-5)
        for (name, p), g in zip(model.named_parameters(), wanted_gradient, strict=True):
            have, want = (torch.zeros_like(p) if x is None else x for x in (p.grad, g))
            assert torch.allclose(have, want, atol=1e-4), name


def test_a_batch_without_any_view_touches_all_parameters():
    model, objective = net(), Answering(LOSS, SPEC)
    batch = collate([sample(1, ()), sample(2, ())], SPEC)
    loss = loss_of(objective(model, batch), objective.counts(batch))
    loss.backward()
    assert torch.isfinite(loss) and all(p.grad is not None for p in model.parameters())


def test_contrast_without_an_embedding_is_refused():
    with pytest.raises(ConfigError, match=r"model\.embedding"):
        parse(TrainConfig, {"loss": {"contrastive": {}}}, "test")


BASE = {"precision": "fp32", "model": {"width": 32, "layers": 1, "heads": 2, "embedding": 16}, "data": {"batch": 8}}


def one_step(out: str, combinations: list[dict[str, Any]]) -> None:
    """On every rank: the contrastive loss, the gradient norm and the gradients of a step, for each combination."""
    world = worlds.from_environment()
    device = engine.start(world)
    found, moments = [], []
    for changes in combinations:
        config = parse(TrainConfig, {**BASE, **changes}, "test")
        trainer = engine.DeepSpeedEngine(net(attention="causal").to(device), config, world)
        objective = Answering(LOSS, SPEC)
        mine = samples()[world.rank * 8 // world.size : (world.rank + 1) * 8 // world.size]
        size = len(mine) // config.accumulate
        batches: list[Batch] = [collate(mine[i : i + size], SPEC).to(device) for i in range(0, len(mine), size)]
        sums = [sum(objective.counts(b)[name] for b in batches) for name in objective.names]
        counts = dict(zip(objective.names, engine.total(sums, device), strict=True))
        objective.prepare(trainer.model, batches, device)
        loss = 0.0
        for batch in batches:
            terms = objective(trainer.model, batch)
            trainer.backward(loss_of(terms, counts))
            loss += float(terms["contrastive"].sum.detach())
        found.append([engine.total([loss], device)[0] / counts["contrastive"], trainer.update(1e-3)])
        moments.append(
            trainer.state().get("exp_avg")
        )  # rank 0 has them: a tenth of the gradient, parameter by parameter, after one step
        trainer.model.destroy()
    if world.is_main:
        torch.save(moments, Path(out) / "moments.pt")
        (Path(out) / "found.json").write_text(json.dumps(found))
    engine.stop()


def test_ranks_micro_batches_and_zero_stages_change_no_loss_and_no_gradient(tmp_path: Path):
    combinations = [{"zero": {"stage": stage}, "accumulate": n} for stage, n in ((0, 1), (2, 1), (2, 2), (3, 2))]
    found, gradients = {}, []
    for count in (1, 2):
        (tmp_path / str(count)).mkdir()
        out = tmp_path / str(count)
        arguments = {"out": str(out), "combinations": combinations}
        ranks(count)("tests.train.test_contrast:one_step", arguments, log=out / "logs")
        found[count] = json.loads((out / "found.json").read_text())
        gradients += torch.load(out / "moments.pt")
    rows = [*found[1], *found[2]]
    for loss, norm in rows:
        assert loss == pytest.approx(rows[0][0], rel=1e-5)
        assert norm == pytest.approx(rows[0][1], rel=1e-4)
    largest = max(float(g.abs().max()) for g in gradients[0].values())
    assert largest > 0 and len(gradients) == 8
    for others in gradients[1:]:
        assert others.keys() == gradients[0].keys()
        for name, gradient in gradients[0].items():
            assert torch.allclose(others[name], gradient, rtol=1e-3, atol=1e-5 * largest), name


def test_two_ranks_plan_and_train_with_it(keypad_shards: Artifact, tmp_path: Path):
    contrastive = {"contrastive": {"between": [["image", "audio"]]}}
    config = {**BASE, "data": {"batch": 16}, "loss": contrastive, "steps": 3}
    arguments = {
        "config": config,
        "shards": str(keypad_shards.path),
        "out": str(tmp_path),
        "where": {"hang_seconds": 60},
    }
    ranks(2)("mmlm.train.train:on_rank", arguments, log=tmp_path / "logs")
    planned = json.loads((tmp_path / "plan.json").read_text())  # the look before training is rank 0's alone
    assert planned["ranks"] == 2 and planned["step_seconds"] > 0
    rows = [json.loads(line)["metrics"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows and all(row["loss_contrastive"] > 0 for row in rows)
    settings = parse(TrainConfig, config, "test")
    with closing(Loader(keypad_shards.path, settings.data, settings.seed, World(), 3, quiet=True)) as loader:
        batches = [loader.batch(step) for step in range(3)]
    spec = loader.reader.spec
    objective = Answering(settings.loss, spec)
    flops = sum(training_flops(settings.model, spec, objective.shape(batch)) for batch in batches)
    row, tokens = rows[-1], sum(Shape.of(batch).tokens for batch in batches)
    assert row["tflops"] * 1e12 * row["step_seconds"] * 3 == pytest.approx(flops, rel=1e-6)
    assert row["tokens_per_second"] * row["step_seconds"] * 3 == pytest.approx(tokens)  # a view is no further data


@pytest.mark.parametrize("pieces", [1, 2])
def test_views_are_in_the_plan_as_pytorch_counts_them(keypad_shards: Artifact, pieces: int):
    """Of a step, as mfu counts it; the first pass of several micro-batches is in the planned time alone."""
    changes = {"data": {"batch": 16}, "accumulate": pieces, "loss": {"contrastive": {"between": [["image", "audio"]]}}}
    with_them, without = (
        parse(TrainConfig, {**BASE, **{k: v for k, v in changes.items() if k != left_out}}, "test")
        for left_out in ("", "loss")
    )
    with closing(Loader(keypad_shards.path, with_them.data, 0, World(), 100, quiet=True)) as loader:
        works = [workload(loader, config, sequences=64) for config in (with_them, without)]
        batches = [loader.batch(step) for step in range(4)]
    spec = loader.reader.spec
    model = weights.build(with_them.model, spec).double()  # the counter does not know the fused attention of float32
    objective = Answering(with_them.loss, spec)
    with FlopCounterMode(display=False) as counter:
        for batch in batches:
            loss_of(objective(model, batch), objective.counts(batch)).backward()
    device = Device("slow", 1e10, 80e9, 3e12, 450e9)
    more, less = (
        forecast(config, config.model, spec, work, device, 1)
        for config, work in zip((with_them, without), works, strict=True)
    )
    assert more.flops == pytest.approx(counter.get_total_flops() / len(batches), rel=0.05)
    assert more.flops > 1.3 * less.flops and more.tokens == less.tokens
    assert more.memory["activations"] > less.memory["activations"]
    whole = replace(works[0], views=None)
    once = forecast(with_them, with_them.model, spec, whole, device, 1).seconds["forward_backward"]
    assert (more.seconds["forward_backward"] > once) == (pieces > 1)
    assert works[0].views and len(works[0].views.lengths) == works[0].views.answers > 0


def thing(seed: int) -> Sample:
    """One of four things: a bright quarter of the picture, a loud band of the sound, a word."""
    kind, rng = seed % 4, np.random.default_rng(seed)
    picture = rng.integers(0, 120, (16, 16, 1)).astype(np.uint8)
    picture[kind // 2 * 8 :, kind % 2 * 8 :][:8, :8] += 120
    mel = rng.uniform(-6, -3, (16, 8)).astype(np.float16)
    mel[:, 2 * kind : 2 * kind + 2] += 3
    tokens = np.array([BOS, IMAGE, AUDIO, CONTEXT, 20 + kind, int(rng.integers(30, 60)), ANSWER, 9, EOS], np.int32)
    return Sample(f"t{seed}", "free", tokens, 6, [picture], [mel], context_spans=[(3, 6)], group=f"kind {kind}")


def test_picture_sound_and_text_of_the_same_thing_become_neighbours(tmp_path: Path):
    model, objective = net(), Answering(LossConfig(answer=0.1, contrastive=ContrastiveConfig()), SPEC)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(60):
        batch = collate([thing(16 * step + n) for n in range(16)], SPEC)
        optimizer.zero_grad()
        loss_of(objective(model, batch), objective.counts(batch)).backward()
        optimizer.step()
    shards = tmp_path / "shards"
    shards.mkdir()
    feature_spec.save(SPEC, shards)
    train_tokenizer(["a b c"], TokenizerConfig(vocab_size=300)).save(shards)
    weights.save_model(tmp_path, model.state_dict(), model.config, shards)
    answerer, asked = Answerer(tmp_path), [thing(10_000 + n) for n in range(40)]
    kinds = [s.group for s in asked]
    for query, candidate in itertools.permutations(["image", "audio", "context"], 2):
        q, c = (embed(answerer, asked, frozenset({m})) for m in (query, candidate))
        assert np.allclose(np.linalg.norm(q, axis=1), 1, atol=1e-5)
        assert (places(q, c, kinds, kinds) == 1).mean() > 0.9, (query, candidate)  # by lot: a quarter
    facts = [facts_of(i, s, "test") for i, s in enumerate(asked)]
    rows = retrieval_rows({"teacher": answerer, "other": object()}, EvaluateConfig(), asked, facts, "test")
    assert {r["modalities"] for r in rows} == {
        f"{a}→{b}" for a, b in itertools.permutations(["image", "audio", "context"], 2)
    }
    assert len(rows) == 18 and all(r["value"] > 0.9 and r["n"] == 40 and r["model"] == "teacher" for r in rows)
