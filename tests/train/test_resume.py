"""A training that goes on elsewhere: on other ranks, at another stage, saved otherwise; and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from mmlm import artifacts
from mmlm.artifacts import Artifact, ArtifactConflict
from mmlm.compress.config import DistillConfig
from mmlm.config import identity, parse
from mmlm.data.reader import ShardReader
from mmlm.errors import ArtifactError, LaunchError
from mmlm.launch.local import ranks
from mmlm.shards.config import ShardConfig
from mmlm.shards.shard import shard
from mmlm.tracking import NullTracker
from mmlm.train import checkpoint
from mmlm.train.config import LoopConfig, TrainConfig, ZeroConfig
from mmlm.train.train import train
from tests.data.test_loader import damage
from tests.faults.stage import Hold, fill_blocks, make_room, small_disk
from tests.train.runs import SMALL, Training, losses, saved, stopped

BASE: dict[str, Any] = {**SMALL, "steps": 4, "save_every": 2, "keep": 3, "precision": "fp32"}


def run(shards: Artifact, out: Path, count: int, **changes: Any) -> Artifact:
    config = parse(TrainConfig, {**BASE, **changes}, "test")
    return train(config, shards, out=out, launch=ranks(count), tracker=NullTracker())


@pytest.fixture(scope="module")
def first(keypad_shards: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Four steps on two ranks at stage 2."""
    return run(keypad_shards, tmp_path_factory.mktemp("first") / "model", 2)


HOW = {
    "accumulate", "recompute", "recompute_granularity", "compile", "zero",
    "save_every", "keep", "keep_every", "keep_best", "checkpoint_format", "log_every",
}  # fmt: skip
WHAT = {
    "steps", "seed", "precision", "data", "optimizer", "lr_factors", "freeze", "schedule", "ema", "scaling", "loss",
    "spikes", "validation", "model",
}  # fmt: skip
"""`scaling` and `spikes` decide which steps are taken; `validation` when training ends, and what becomes the model."""
WAYS: list[dict[str, Any]] = [
    {"zero": {"stage": 3, "offload_parameters": True}}, {"zero": {"stage": 1, "offload_optimizer": True}},
    {"accumulate": 4}, {"recompute": 1}, {"recompute_granularity": "selective"},
    {"compile": True}, {"save_every": 1}, {"keep": 5}, {"keep_every": 2},
    {"log_every": 7}, {"checkpoint_format": "sharded"},
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "own"), [(TrainConfig, {"lora"}), (DistillConfig, {"teacher", "temperature", "task", "scratch"})]
)
def test_every_field_is_known_as_what_a_training_is_or_how_it_runs(kind: type[LoopConfig], own: set[str]):
    """A new field belongs into one of the lists above; and below `zero` everything is left out, so nothing else may be."""
    assert set(kind.how_it_runs) == HOW and set(kind.model_fields) == HOW | WHAT | own
    assert set(identity(kind())) == WHAT | own
    assert set(ZeroConfig.model_fields) == {"stage", "offload_optimizer", "offload_parameters"}


def test_a_field_that_nobody_thought_about_is_part_of_what_a_training_is():
    class Later(TrainConfig):
        new: int = 1

    assert identity(Later()) != identity(Later(new=2)) and identity(Later()) == identity(Later(keep=7))


def test_how_a_training_runs_is_no_part_of_what_it_is():
    base = identity(parse(TrainConfig, BASE, "test"))
    assert all(identity(parse(TrainConfig, {**BASE, **way}, "test")) == base for way in WAYS)
    others: list[dict[str, Any]] = [
        {"precision": "bf16"}, {"seed": 1}, {"data": {"batch": 13}}, {"steps": 5}, {"validation": {"every": 2}},
    ]  # fmt: skip
    assert not any(identity(parse(TrainConfig, {**BASE, **other}, "test")) == base for other in others)
    looking = {**BASE, "validation": {"every": 2}}
    assert len({json.dumps(identity(parse(TrainConfig, {**looking, "keep_best": n}, "test"))) for n in (0, 2)}) == 1


def test_a_training_goes_on_in_another_way(
    first: Artifact, keypad_shards: Artifact, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    out = stopped(first, tmp_path / "model", 2)
    way = {"zero": {"stage": 0}, "accumulate": 2, "recompute": 1, "save_every": 1, "keep": 9}
    resumed = run(keypad_shards, out, 1, **way)
    assert losses(out) == pytest.approx(losses(first.path), rel=1e-5)
    assert resumed.fingerprint == first.fingerprint and resumed.counts["zero_stage"] == 0
    assert sorted(path.name for path in (out / "checkpoints").glob("*step*")) == [f"step-0000000{n}" for n in (2, 3, 4)]
    assert json.loads((out / "plan.json").read_text())["how"]["accumulate"] == 2
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != ".lock"}
    capfd.readouterr()
    assert run(keypad_shards, out, 2) == resumed  # in whichever way it is asked for: it is there
    others = "accumulate, recompute, zero, save_every, keep"
    assert f"{out} is finished, with other {others}: that is how it ran, so it is not made" in capfd.readouterr().err
    assert run(keypad_shards, out, 2, **way) == resumed and capfd.readouterr().err == ""
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != ".lock"}
    with pytest.raises(ArtifactConflict):
        run(keypad_shards, out, 2, precision="bf16")


SLOW = [{"stage": 1, "offload_optimizer": True}, {"stage": 0}]


@pytest.mark.parametrize("zero", [{"stage": 3}, *(pytest.param(zero, marks=pytest.mark.slow) for zero in SLOW)])
def test_a_training_goes_on_at_another_stage(
    first: Artifact, keypad_shards: Artifact, tmp_path: Path, zero: dict[str, Any]
):
    out = stopped(first, tmp_path / "model", 2)
    assert run(keypad_shards, out, 2, zero=zero, accumulate=2).counts["zero_stage"] == zero["stage"]
    assert losses(out) == pytest.approx(losses(first.path), rel=1e-5)


def change(out: Path, without: str = "", **changes: Any) -> None:
    """Put something else into what the checkpoint of step 2 says, with the hash of what it then says."""
    path = out / "checkpoints" / "step-00000002" / "state.json"
    told = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps(checkpoint.sealed({name: value for name, value in told.items() if name != without})))


def worse(out: Path) -> dict[str, Any]:
    """What the checkpoint of step 2 says of the probe batch, with a loss that the model does not have."""
    told = json.loads((out / "checkpoints" / "step-00000002" / "state.json").read_text())
    parts = [{**part, "loss": part["loss"] + 0.02} for part in told["probes"]]
    return {"probe": told["probe"] + 0.02, "probes": parts}


@pytest.mark.parametrize("without", ["", pytest.param("probes", marks=pytest.mark.slow, id="of an earlier version")])
def test_a_model_that_is_not_the_one_that_was_saved_is_refused_with_both_numbers(
    first: Artifact, keypad_shards: Artifact, tmp_path: Path, without: str
):
    out = stopped(first, tmp_path / "model", 2)
    probe = json.loads((out / "checkpoints" / "step-00000002" / "state.json").read_text())["probe"]
    change(out, without, **worse(out))
    with pytest.raises(ArtifactError) as caught:
        run(keypad_shards, out, 1)
    found = float(str(caught.value.found).rpartition(" ")[2])
    assert found == pytest.approx(probe, rel=1e-3 if without else 1e-4)  # of all records together, or of the parts
    assert str(caught.value.wanted).startswith(f"{probe + 0.02:.6f}, as when step 2 was saved")
    assert "remove the folder" in caught.value.cure and len(losses(out)) == 4  # nothing was done
    assert ("mmlm verify" in caught.value.cure) == bool(without)  # it does not tell which records it was proved on
    if without:
        change(out, probe=found)
        run(keypad_shards, out, 1)
        assert "going on from step 2, proved on the probe batch (loss" in (out / "logs" / "rank-0.log").read_text()


@pytest.mark.slow  # 15 s
def test_a_record_of_the_probe_that_is_damaged_or_repaired_is_blamed_and_not_the_model(
    first: Artifact, keypad_shards: Artifact, tmp_path: Path
):
    shards = Path(shutil.copytree(keypad_shards.path, tmp_path / "shards"))
    name = ShardReader(shards)[3].id
    tar = shards / ShardReader(shards).shard_of(3)
    sound = tar.read_bytes()
    damage(shards, 3)
    out = stopped(first, tmp_path / "damaged", 2)
    made = run(artifacts.read(shards), out, 1)
    said = (out / "logs" / "rank-0.log").read_text()
    assert f"record 4 of the probe batch was {name} when this was saved and is " in said
    assert "going on from step 2, proved on 24 of 32 records of the probe batch" in said and made.counts["steps"] == 4

    other = stopped(first, tmp_path / "other", 2)
    change(other, **worse(other))
    with pytest.raises(ArtifactError, match=r"loss on the probe batch is .* as when step 2 was saved") as caught:
        run(artifacts.read(shards), other, 1)
    assert "mmlm verify" not in caught.value.cure  # the records that are the same do not have the same loss

    tar.write_bytes(sound)
    again = stopped(made, tmp_path / "repaired", 4)
    run(artifacts.read(shards), again, 1)
    said = (again / "logs" / "rank-0.log").read_text()
    assert f"when this was saved and is {name} now" in said
    assert "going on from step 4, proved on 24 of 32 records of the probe batch" in said


def test_a_checkpoint_of_other_data_is_refused_with_both_digests(
    first: Artifact, keypad_shards: Artifact, tmp_path: Path
):
    out = stopped(first, tmp_path / "model", 2)
    data = json.loads((out / "checkpoints" / "step-00000002" / "state.json").read_text())["data"]
    change(out, data={**data, "order": "f" * 64})
    with pytest.raises(ArtifactError, match=f"have the order {'f' * 64}; wanted {data['order']}"):
        run(keypad_shards, out, 1)
    assert checkpoint.steps(out / "checkpoints") == {2} and len(losses(out)) == 4  # and is there for the right data


def test_shards_that_were_made_anew_are_refused_and_nothing_is_lost(
    first: Artifact, keypad_manifest: Artifact, keypad_shards: Artifact, tmp_path: Path
):
    made_of = {**keypad_shards.config, "shard_records": 50}
    others = shard(
        parse(ShardConfig, made_of, "test"), keypad_manifest, data=keypad_manifest.path.parent / "raw",
        out=tmp_path / "shards", workers=1, tracker=None,
    )  # fmt: skip
    assert others.digest != keypad_shards.digest
    out = stopped(first, tmp_path / "model", 2)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(ArtifactConflict, match=r"made from another config or other inputs.*--replace"):
        run(others, out, 2)
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("before", "after"), [(2, 1), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_a_training_of_embeddings_goes_on_on_another_number_of_ranks(
    keypad_shards: Artifact, tmp_path: Path, before: int, after: int
):
    """The probe batch is whole on every rank: gathered, each of its records would be a negative of itself."""
    changes = {
        "model": {**SMALL["model"], "embedding": 16}, "loss": {"contrastive": {"between": [["image", "audio"]]}},
    }  # fmt: skip
    first = run(keypad_shards, tmp_path / "first", before, **changes)
    out = stopped(first, tmp_path / "model", 2)
    run(keypad_shards, out, after, **changes)
    assert losses(out) == pytest.approx(losses(first.path), rel=1e-4)


def test_without_checkpoints_it_begins_anew_whatever_was_skipped(
    first: Artifact, keypad_shards: Artifact, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    """What the errors say: remove the folder to start over. Else old steps would be passed over in silence, and a roll-back
    that was killed would want its checkpoint for ever."""
    out = stopped(first, tmp_path / "model", 2)
    told = {"steps": {"1": "bad", "3": "bad"}, "rollbacks": 3, "settled": [1], "going_back": 2}
    evidence = out / "evidence"
    evidence.mkdir()
    (evidence / "skipped.json").write_text(json.dumps(told))
    (evidence / "step-00000002.json").write_text("{}")
    shutil.rmtree(out / "checkpoints")
    made = run(keypad_shards, out, 2)
    assert losses(out) == losses(first.path) and made.digest == first.digest and "skipped" not in made.counts
    assert [path.name for path in evidence.iterdir()] == ["step-00000002.json"]
    assert "begun anew, without a checkpoint; the 2 steps that were skipped are tried again" in capfd.readouterr().err


@pytest.mark.parametrize("form", ["full", pytest.param("sharded", marks=pytest.mark.slow)])
def test_a_save_that_fails_ends_every_rank_and_leaves_the_checkpoint_before_it(
    first: Artifact, keypad_shards: Artifact, tmp_path: Path, form: str
):
    """A disk without a free block, for checkpoints only: what else is written during training must not be what fails."""
    out = stopped(first, tmp_path / "model", 2)
    with small_disk(tmp_path / "disk") as disk:
        shutil.move(out / "checkpoints", disk / "checkpoints")
        (out / "checkpoints").symlink_to(disk / "checkpoints")
        fill_blocks(disk)
        with pytest.raises(LaunchError, match=r"(?i)disk is full|no space"):
            run(keypad_shards, out, 2, save_every=1, checkpoint_format=form)
        assert not (out / "artifact.json").exists() and checkpoint.steps(out / "checkpoints") == {2}
        make_room(disk)
        assert run(keypad_shards, out, 2, save_every=1, checkpoint_format=form).digest == first.digest
        assert losses(out) == losses(first.path)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["full", "sharded"])
def test_steps_go_on_while_a_checkpoint_is_written(keypad_shards: Artifact, tmp_path: Path, form: str):
    """Up to the next save, which waits; nothing is there under a good name until it is whole."""
    hold = Hold(tmp_path / "hold", checkpoint.POINT, 2)  # its first file is written
    config = {**SMALL, "steps": 12, "save_every": 6, "checkpoint_format": form}
    run = Training(keypad_shards, tmp_path / "model", 2, config, "", **hold.environment)
    run.until("a save that is held", hold.pid)
    run.until("the step before the next save", lambda: run.step() >= 11)
    assert run.process.poll() is None and saved(run.out) == 0 and not hold.passed()
    hold.go()
    assert run.end() == 0, run.words()
    assert checkpoint.steps(run.out / "checkpoints") == {6, 12} and sorted(losses(run.out)) == list(range(1, 13))


def end_of(run: Training) -> str:
    """What it said; it must have been saved where it was asked to stop."""
    assert run.end() == 4, run.words()
    assert f"was asked to stop and is saved at step {saved(run.out)} of " in run.words()
    return run.words()


def same_end(shards: Artifact, out: Path, config: dict[str, Any], count: int) -> None:
    """What was stopped goes on to the very end of a training that never was."""
    last = Training(shards, out, count, config)
    assert last.end() == 0, last.words()
    whole = Training(shards, out.parent / "whole", count, config)
    assert whole.end() == 0, whole.words()
    assert losses(out) == losses(whole.out)
    assert (out / "model.safetensors").read_bytes() == (whole.out / "model.safetensors").read_bytes()


def test_sigterm_finishes_the_step_saves_and_goes_on_as_never_stopped(keypad_shards: Artifact, tmp_path: Path):
    config = {**SMALL, "steps": 60, "save_every": 50}
    struck = Training(keypad_shards, tmp_path / "model", 2, config)
    struck.until("a few steps", lambda: struck.step() >= 5)
    os.kill(struck.process.pid, signal.SIGTERM)
    assert "(SIGTERM)" in end_of(struck) and 5 < saved(struck.out) < 60
    same_end(keypad_shards, struck.out, config, 2)


@pytest.mark.slow
def test_a_file_and_a_time_limit_stop_a_training_that_goes_on_as_never_stopped(keypad_shards: Artifact, tmp_path: Path):
    config, out, notice = {**SMALL, "steps": 12, "save_every": 50}, tmp_path / "model", tmp_path / "stop"
    notice.touch()
    assert f"{notice} is there" in end_of(Training(keypad_shards, out, 2, config, MMLM_STOP_FILE=str(notice)))
    first = saved(out)
    notice.unlink()
    soon = {"MMLM_STOP_FILE": str(notice), "MMLM_DEADLINE": str(time.time() + 5)}
    assert "its time is over" in end_of(Training(keypad_shards, out, 2, config, **soon))
    assert 0 < first < saved(out) < 12
    same_end(keypad_shards, out, config, 2)
