"""Training on real ranks over gloo, against a plain PyTorch loop and against itself after a stop."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mmlm import artifacts
from mmlm.artifacts import Artifact
from mmlm.config import parse
from mmlm.data.config import DataConfig
from mmlm.data.loader import Loader
from mmlm.errors import ArtifactError, ConfigError
from mmlm.features import spec as feature_spec
from mmlm.launch.local import ranks
from mmlm.tracking import NullTracker
from mmlm.train import checkpoint, weights
from mmlm.train.config import CosineConfig, TrainConfig
from mmlm.train.schedule import learning_rate
from mmlm.train.train import train
from mmlm.world import World

SLOW = pytest.mark.slow
SMALL: dict[str, Any] = {
    "steps": 4,
    "save_every": 2,
    "keep": 3,
    "log_every": 1,
    "model": {"width": 32, "layers": 1, "heads": 2, "attention": "prefix"},
    "data": {"batch": 16},
}


def run(shards: Artifact, out: Path, count: int, **changes: Any) -> Artifact:
    config = parse(TrainConfig, {**SMALL, **changes}, "test")
    return train(config, shards, out=out, launch=ranks(count), tracker=NullTracker())


def losses(out: Path) -> list[float]:
    return [json.loads(line)["metrics"]["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def two_ranks(keypad_shards: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return run(keypad_shards, tmp_path_factory.mktemp("two") / "model", 2)


def test_two_ranks_equal_one_on_the_same_global_batch(two_ranks: Artifact, keypad_shards: Artifact, tmp_path: Path):
    alone = run(keypad_shards, tmp_path / "model", 1)
    assert two_ranks.counts["ranks"] == 2 and alone.counts["ranks"] == 1
    assert losses(alone.path) == pytest.approx(losses(two_ranks.path), rel=2**-8)  # bf16 keeps 8 bits


def test_four_micro_batches_equal_one(two_ranks: Artifact, keypad_shards: Artifact, tmp_path: Path):
    cut = run(keypad_shards, tmp_path / "model", 2, accumulate=4)
    assert losses(cut.path) == pytest.approx(losses(two_ranks.path), rel=2**-8)


@pytest.mark.slow  # compilation on each rank
@pytest.mark.timeout(900)
def test_compiled_blocks_train_as_others_do(two_ranks: Artifact, keypad_shards: Artifact, tmp_path: Path):
    """In bf16 under the engine: rounding falls elsewhere where operations become one, no more."""
    compiled = run(keypad_shards, tmp_path / "model", 2, compile=True)
    assert losses(compiled.path) == pytest.approx(losses(two_ranks.path), rel=2**-7)
    norms = [
        [
            json.loads(line)["metrics"].get("gradient_norm", 0.0)
            for line in (path / "metrics.jsonl").read_text().splitlines()
        ]
        for path in (compiled.path, two_ranks.path)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=0.05)


def test_a_batch_of_fewer_records_than_micro_batches_is_refused(keypad_shards: Artifact):
    loader = Loader(keypad_shards.path, DataConfig(batch=6), 0, World(0, 2))
    assert [len(b.tokens_BT) for b in loader.batches(0, 3)] == [1, 1, 1]
    with pytest.raises(ConfigError, match="each of 4 micro-batches on each of 2 ranks"):
        loader.batches(0, 4)


def test_two_steps_and_two_more_after_a_stop_equal_four(two_ranks: Artifact, keypad_shards: Artifact, tmp_path: Path):
    out = tmp_path / "model"
    shutil.copytree(two_ranks.path, out)
    (out / "artifact.json").unlink()
    shutil.rmtree(out / "checkpoints" / "step-00000004")
    (out / artifacts.WORK).write_text(json.dumps({"fingerprint": two_ranks.fingerprint}))
    resumed = run(keypad_shards, out, 2)
    assert losses(out) == losses(two_ranks.path)  # the same number of ranks: bit by bit
    assert resumed.digest == two_ranks.digest


@pytest.mark.slow  # 20 s each
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_what_no_step_trains_costs_nothing_and_stays_in_the_model(keypad_shards: Artifact, tmp_path: Path, stage: int):
    """Frozen without an end: as frozen up to the last step, but without gradients and optimizer state; also resumed."""
    rules = {"zero": {"stage": stage}, "ema": {"decay": 0.5, "use": True}}
    modules = ["image", "blocks.0.feed_forward", "tokens"]
    held = run(keypad_shards, tmp_path / "held", 2, freeze=[{"modules": modules, "end": 4}], **rules)
    rests = run(keypad_shards, tmp_path / "rests", 2, freeze=[{"modules": modules}], **rules)
    assert losses(rests.path) == pytest.approx(losses(held.path), rel=2**-8)
    torch.manual_seed(0)
    first = weights.build(parse(TrainConfig, SMALL, "test").model, feature_spec.load(keypad_shards.path)).state_dict()
    saved = {path.stem: load_file(path) for path in (rests.path / "checkpoints/step-00000004").glob("*.safetensors")}
    made = load_file(rests.path / "model.safetensors")
    resting = {name for name in first if name.startswith(tuple(f"{module}." for module in modules))}
    assert made.keys() == saved["weight"].keys() == saved["ema"].keys() == first.keys()
    assert saved["exp_avg"].keys() == first.keys() - resting
    for name in first:
        assert (
            torch.equal(made[name], first[name]) == torch.equal(saved["weight"][name], first[name]) == (name in resting)
        )

    out = tmp_path / "model"
    shutil.copytree(rests.path, out)
    (out / "artifact.json").unlink()
    shutil.rmtree(out / "checkpoints" / "step-00000004")
    earlier = out / "checkpoints" / "step-00000002"
    (out / artifacts.WORK).write_text(json.dumps({"fingerprint": rests.fingerprint}))
    assert load_file(earlier / "weight.safetensors").keys() == first.keys()
    resumed = run(keypad_shards, out, 2, freeze=[{"modules": modules}], **rules)
    assert losses(out) == losses(rests.path) and resumed.digest == rests.digest


@pytest.mark.slow  # 12 s each
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_computing_with_averaged_weights_leaves_the_training_alone(
    keypad_shards: Artifact, tmp_path: Path, precision: str
):
    """At ZeRO 3 a pass without a backward one keeps weights gathered; the step after it must not read them."""
    rules = {"zero": {"stage": 3}, "precision": precision, "ema": {"decay": 0.5, "use": True}}
    often = run(keypad_shards, tmp_path / "often", 2, save_every=1, **rules)
    seldom = run(keypad_shards, tmp_path / "seldom", 2, save_every=100, **rules)
    assert losses(often.path) == losses(seldom.path) and often.digest == seldom.digest


def test_what_is_frozen_averaged_and_made_orthogonal_goes_on_after_a_stop(keypad_shards: Artifact, tmp_path: Path):
    rules = {
        "optimizer": {"kind": "muon"},
        "freeze": [{"modules": ["image", "blocks.0"], "end": 3}],
        "lr_factors": {"tokens": 0.5},
        "ema": {"decay": 0.5},
        "zero": {"stage": 3},
        "precision": "fp32",
        "model": {**SMALL["model"], "dropout": 0.1},  # its masks are those of an uninterrupted training, too
    }
    whole = run(keypad_shards, tmp_path / "whole", 1, **rules)
    out, saves = tmp_path / "model", tmp_path / "whole" / "checkpoints"
    shutil.copytree(whole.path, out)
    (out / "artifact.json").unlink()
    shutil.rmtree(out / "checkpoints" / "step-00000004")
    (out / artifacts.WORK).write_text(json.dumps({"fingerprint": whole.fingerprint}))
    resumed = run(keypad_shards, out, 1, **rules)
    assert losses(out) == losses(whole.path) and resumed.digest == whole.digest
    torch.manual_seed(0)
    first = weights.build(parse(TrainConfig, SMALL, "test").model, feature_spec.load(keypad_shards.path)).state_dict()
    early, late, average = (
        load_file(saves / name)
        for name in (
            "step-00000002/weight.safetensors",
            "step-00000004/weight.safetensors",
            "step-00000004/ema.safetensors",
        )
    )
    held = [name for name in first if name.startswith(("image", "blocks.0"))]
    assert held and all(torch.equal(early[name], first[name]) for name in held)
    assert not any(torch.equal(late[name], first[name]) for name in held)
    assert not torch.equal(early["answer.weight"], first["answer.weight"])
    stored = load_file(whole.path / "model.safetensors")
    assert all(torch.equal(stored[name], average[name]) for name in stored)
    assert not torch.equal(average["answer.weight"], late["answer.weight"])


def test_the_same_config_again_is_left_untouched(two_ranks: Artifact, keypad_shards: Artifact):
    before = (two_ranks.path / "artifact.json").stat().st_mtime_ns
    assert run(keypad_shards, two_ranks.path, 1).digest == two_ranks.digest
    assert (two_ranks.path / "artifact.json").stat().st_mtime_ns == before


def test_another_config_in_the_same_folder_is_refused(two_ranks: Artifact, keypad_shards: Artifact):
    with pytest.raises(ArtifactError, match="another config"):
        run(keypad_shards, two_ranks.path, 2, seed=1)


def test_a_damaged_checkpoint_is_passed_over(two_ranks: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_ranks.path / "checkpoints", folder)
    newest = checkpoint.newest(folder)
    assert newest is not None and newest.step == 4
    path = folder / "step-00000004" / "weight.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    older = checkpoint.newest(folder)
    assert older is not None and older.step == 2
    assert "damaged" in capsys.readouterr().err


def test_a_training_goes_on_from_the_checkpoint_before_a_damaged_one(
    two_ranks: Artifact, keypad_shards: Artifact, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    out = tmp_path / "model"
    shutil.copytree(two_ranks.path, out)
    (out / "artifact.json").unlink()
    (out / artifacts.WORK).write_text(json.dumps({"fingerprint": two_ranks.fingerprint}))
    path = out / "checkpoints" / "step-00000004" / "exp_avg.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    resumed = run(keypad_shards, out, 2)
    assert losses(out) == losses(two_ranks.path) and resumed.digest == two_ranks.digest
    said = capfd.readouterr().err
    assert "step-00000004" in said and "damaged" in said
    assert "going on from step 2" in said


def test_a_checkpoint_of_another_feature_spec_is_refused(two_ranks: Artifact, keypad_shards: Artifact):
    ours = feature_spec.load(two_ranks.path)
    feature_spec.require_same(ours, feature_spec.load(keypad_shards.path))
    other = ours.model_copy(update={"tokenizer_digest": "f" * 64})
    with pytest.raises(ArtifactError, match="tokenizer"):
        feature_spec.require_same(ours, other)
    smaller = ours.model_copy(update={"max_len": 12})
    with pytest.raises(ArtifactError, match="max_len"):
        feature_spec.require_same(ours, smaller)


def test_schedule_rises_then_falls_to_its_floor():
    rates = [learning_rate(s, 100, 1.0, CosineConfig(warmup=0.1, floor=0.05)) for s in range(100)]
    assert rates[:10] == pytest.approx([(s + 1) / 10 for s in range(10)])
    assert all(a >= b for a, b in itertools.pairwise(rates[9:]))
    assert rates[-1] == pytest.approx(0.05, abs=0.002)
