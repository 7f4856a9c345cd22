"""The validation split while training: the same on any number of ranks, early stop, the best weights; telemetry's rows."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mmlm.artifacts import Artifact
from mmlm.config import parse
from mmlm.data.collate import IGNORE, pack
from mmlm.errors import ConfigError
from mmlm.features import spec as feature_spec
from mmlm.launch.local import ranks
from mmlm.model.config import ModelConfig
from mmlm.model.flops import Shape
from mmlm.tracking import NullTracker
from mmlm.train import checkpoint, validation, weights
from mmlm.train.config import TrainConfig
from mmlm.train.memory import resident_bytes
from mmlm.train.telemetry import GIVEN, Telemetry, given_of_targets
from mmlm.train.terms.term import Term
from mmlm.train.train import train
from mmlm.train.validation import Validation
from mmlm.world import World
from tests.data.test_loader import damage
from tests.small import SPEC, sample
from tests.train.runs import SMALL


@pytest.mark.slow
def test_every_number_of_ranks_sees_the_same(keypad_shards: Artifact, tmp_path: Path):
    config = {**SMALL, "zero": {"stage": 3}, "validation": {"every": 1, "records": 50}}
    for count in (1, 2):
        arguments = {"config": config, "shards": str(keypad_shards.path), "out": str(tmp_path)}
        ranks(count)("tests.train.targets:look", arguments, log=tmp_path / "logs")
    alone, *two = [json.loads((tmp_path / f"val-{n}.json").read_text()) for n in ("1-0", "2-0", "2-1")]
    assert two == [alone, alone]
    assert alone["val/loss"] == alone["val/loss_answer"] + alone["val/loss_label"]


def test_training_that_gets_worse_stops_and_the_best_becomes_the_model(keypad_shards: Artifact, tmp_path: Path):
    changes: dict[str, Any] = {
        "steps": 60,
        "optimizer": {"lr": 0.3},
        "schedule": {"warmup": 0.1},
        "spikes": {"deviations": 0},
        "validation": {"every": 3, "records": 20, "patience": 3, "export": "best"},
    }
    settings = parse(TrainConfig, {**SMALL, **changes}, "test")
    made = train(settings, keypad_shards, out=tmp_path / "model", launch=ranks(1), tracker=NullTracker())
    assert made.counts["steps"] < 60
    rows = [json.loads(line) for line in (made.path / "metrics.jsonl").read_text().splitlines()]
    looks = {row["step"]: row["metrics"]["val/loss"] for row in rows if "val/loss" in row["metrics"]}
    best = min(looks, key=lambda step: looks[step])
    assert made.counts["exported_step"] == best
    assert made.counts["steps"] == best + 3 * 3  # three looks without a better one
    saved = checkpoint.best(made.path / "checkpoints")
    assert saved is not None and saved.step == best and saved.state["score"] == looks[best]
    model = load_file(made.path / "model.safetensors")
    for name, tensor in saved.tensors()["weight"].items():
        assert torch.equal(model[name], tensor), name
    newest = checkpoint.newest(made.path / "checkpoints")
    assert newest is not None and newest.state["validation"] == {"best": looks[best], "best_step": best, "stale": 3}


def test_patience_goes_through_a_checkpoint(keypad_shards: Artifact):
    changes = {"validation": {"every": 2, "patience": 2, "metric": "label_accuracy"}}
    settings = parse(TrainConfig, {**SMALL, **changes}, "test")
    one, other = (Validation(keypad_shards.path, settings, World(), torch.device("cpu")) for _ in range(2))
    for step, accuracy in ((2, 0.5), (4, 0.75), (6, 0.7)):
        one._note({"val/label_accuracy": accuracy}, step)
    assert (one.best, one.best_step, one.stale, one.over) == (0.25, 4, 1, False)
    other.load(json.loads(json.dumps(one.state())))
    other._note({"val/label_accuracy": 0.75}, 8)  # as good is not better
    assert other.over and not other.improved


def test_a_look_that_gives_no_number_is_never_the_best(keypad_shards: Artifact):
    settings = parse(TrainConfig, {**SMALL, "validation": {"every": 2, "patience": 3}}, "test")
    looks = Validation(keypad_shards.path, settings, World(), torch.device("cpu"))
    looks._note({"val/loss": math.nan}, 2)
    assert not looks.improved and looks.best is None and looks.score({"val/loss": math.nan}) is None
    looks._note({"val/loss": 3.0}, 4)
    assert (looks.improved, looks.best, looks.best_step, looks.stale) == (True, 3.0, 4, 0)


def test_damaged_samples_are_left_out_on_every_number_of_ranks(
    keypad_shards: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    folder = Path(shutil.copytree(keypad_shards.path, tmp_path / "shards"))
    keys = [damage(folder, n, split="val") for n in (0, 1, 5)]
    monkeypatch.setattr(validation, "CHUNK", 2)  # the first chunk is damaged as a whole
    settings = parse(TrainConfig, {**SMALL, "zero": {"stage": 0}, "validation": {"every": 1}}, "test")
    model = weights.build(settings.model, feature_spec.load(folder))
    looks = Validation(folder, settings, World(), torch.device("cpu"))
    with torch.no_grad():
        found = [looks._chunk(model, chunk) for chunk in looks.chunks]
    assert found[0] == dict.fromkeys(found[0], (0.0, 0.0))
    assert [row["right"][1] for row in found[:4]] == [0, 2, 1, 2]
    said = capsys.readouterr().err
    assert all(said.count(f"{key} is damaged") == 1 for key in keys)


def test_what_cannot_be_chosen_is_refused():
    with pytest.raises(ConfigError, match="need `every`"):
        parse(TrainConfig, {"validation": {"patience": 2}}, "test")


@pytest.mark.parametrize(
    ("changes", "labels", "said"),
    [
        ({"validation": {"every": 2, "metric": "label_accuracy"}}, False, "metric: label_accuracy, and none of the"),
        ({"validation": {"every": 2, "metric": "label_accuracy", "patience": 1}}, True, ""),
        ({"validation": {"every": 2, "export": "best"}}, False, ""),
        ({"validation": {"every": 2, "export": "best"}, "loss": {"answer": 0}}, False, "metric: loss, and nothing of"),
        ({"validation": {"every": 2}, "keep_best": 1, "loss": {"answer": 0}}, False, "metric: loss, and nothing of"),
        ({"validation": {"every": 2, "patience": 1}, "loss": {"answer": 0}}, True, ""),
        ({"validation": {"every": 2}, "loss": {"answer": 0}}, False, ""),
    ],
)
def test_a_metric_for_which_no_record_counts_is_refused(
    changes: dict[str, Any], labels: bool, said: str, keypad_shards: Artifact, tmp_path: Path
):
    folder = Path(shutil.copytree(keypad_shards.path, tmp_path / "shards"))
    spec = feature_spec.load(folder)
    if not labels:  # what the same records are where their answers are texts
        tasks = [task.model_copy(update={"labels": [], "has_text": True}) for task in spec.tasks]
        feature_spec.save(spec.model_copy(update={"tasks": tasks}), folder)
    settings = parse(TrainConfig, {**SMALL, **changes}, "test")
    with pytest.raises(ConfigError, match=said) if said else contextlib.nullcontext():
        Validation(folder, settings, World(), torch.device("cpu"))


def test_losses_are_told_apart_by_what_their_record_gives():
    given = [("image", "audio"), (), ("image",), ("audio", "fields"), ("context",)]
    samples = [sample(n, parts) for n, parts in enumerate(given)]
    batch = pack([samples[:3], samples[3:]], SPEC)
    kinds = [GIVEN[k] for k in given_of_targets(batch).tolist()]
    answers = [len(s.tokens) - 1 - s.answer_at for s in samples]
    wanted = ["image+audio", "text", "image", "audio", "text"]
    assert kinds == [name for name, count in zip(wanted, answers, strict=True) for _ in range(count)]
    assert len(kinds) == int((batch.target_BT != IGNORE).sum())


def test_a_roll_back_and_a_lost_loss_leave_no_trace_in_the_next_row(tmp_path: Path):
    batch = pack([[sample(0, ("image",))]], SPEC)
    answers = int((batch.target_BT != IGNORE).sum())
    telemetry = Telemetry(
        tmp_path, World(), torch.device("cpu"), "fp32", ModelConfig(width=32, layers=1, heads=2), SPEC
    )

    def step(loss: float) -> None:
        telemetry.begin()
        telemetry.count(batch, {"answer": Term(torch.tensor(loss), 1.0, torch.full((answers,), loss))}, Shape.of(batch))
        telemetry.end()

    for loss in (9.0, 9.0, 9.0):
        step(loss)
    telemetry.rewind(0)
    step(2.0)
    step(math.nan)
    time.sleep(0.01)
    telemetry.row(2, {})
    telemetry.write(2, {"val/loss": math.nan})
    first, second = (json.loads(line)["metrics"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert first["loss_given/image"] == 2.0 and second == {}
    assert first["samples_per_second"] * first["step_seconds"] == pytest.approx(1.0)  # two records, two steps


def test_resident_memory_grows_with_what_is_held():
    before = resident_bytes()
    held = torch.ones(16 << 20)
    after = resident_bytes()
    assert after[1] - before[1] > 0.9 * held.numel() * 4
