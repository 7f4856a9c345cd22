"""Checkpoints that the ranks write in pieces: what is in them, who can go on with them, and what strikes them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mmlm.artifacts import Artifact
from mmlm.config import parse
from mmlm.launch.local import ranks
from mmlm.shards.faultpoints import VARIABLE
from mmlm.tracking import NullTracker
from mmlm.train import checkpoint
from mmlm.train.config import LoopConfig, TrainConfig
from mmlm.train.saved_tensors import LARGE, is_sharded
from mmlm.train.train import train
from tests.faults.stage import Hold
from tests.train.runs import SMALL, Training, losses, saved, stopped

BASE: dict[str, Any] = {
    **SMALL, "steps": 4, "save_every": 2, "keep": 3, "precision": "fp32", "checkpoint_format": "sharded",
    "ema": {"decay": 0.9}, "freeze": [{"modules": ["image"]}],
}  # fmt: skip
"""With parameters that rest, which only rank 0 has whole."""


def run(shards: Artifact, out: Path, count: int, **changes: Any) -> Artifact:
    config = parse(TrainConfig, {**BASE, **changes}, "test")
    return train(config, shards, out=out, launch=ranks(count), tracker=NullTracker())


@pytest.fixture(scope="module")
def full(keypad_shards: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The same training with whole tensors."""
    return run(keypad_shards, tmp_path_factory.mktemp("full") / "model", 2, checkpoint_format="full")


@pytest.fixture(scope="module")
def pieces(keypad_shards: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return run(keypad_shards, tmp_path_factory.mktemp("pieces") / "model", 2)


def tensors(out: Path, step: int) -> dict[str, torch.Tensor]:
    found = checkpoint.read(out / "checkpoints", step).tensors()
    return {f"{kind}:{name}": tensor for kind, named in found.items() for name, tensor in named.items()}


def files(out: Path, step: int) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints" / checkpoint.name_of(step)).iterdir())


def require_equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_pieces_are_the_whole_bit_for_bit(full: Artifact, pieces: Artifact):
    both = ["rank-00000.safetensors", "rank-00001.safetensors", "state.json"]
    for step in (2, 4):
        assert files(pieces.path, step) == both and "weight.safetensors" in files(full.path, step)
        whole = tensors(full.path, step)
        assert {"weight", "ema", "exp_avg"} <= {name.split(":")[0] for name in whole}
        require_equal(whole, tensors(pieces.path, step))
    assert pieces.digest == full.digest and pieces.fingerprint == full.fingerprint
    sizes = [(pieces.path / "checkpoints/step-00000004" / name).stat().st_size for name in both[:2]]
    total = sum(tensor.nbytes for tensor in tensors(full.path, 4).values())
    assert total <= sum(sizes) < total + 60_000 and min(sizes) > total / 4


@pytest.mark.parametrize(
    ("count", "way"),
    [
        (2, {}), (1, {"zero": {"stage": 0}}),
        pytest.param(2, {"zero": {"stage": 3}, "checkpoint_format": "full"}, marks=pytest.mark.slow),
        pytest.param(3, {"zero": {"stage": 1}}, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_pieces_go_on_on_any_ranks_at_any_stage(
    pieces: Artifact, keypad_shards: Artifact, tmp_path: Path, count: int, way: dict[str, Any]
):
    out = stopped(pieces, tmp_path / "model", 2)
    resumed = run(keypad_shards, out, count, **way)
    assert losses(out) == pytest.approx(losses(pieces.path), rel=1e-5)
    if not way:
        assert resumed.digest == pieces.digest and losses(out) == losses(pieces.path)
        require_equal(tensors(out, 4), tensors(pieces.path, 4))
    cut = count > 1 and way.get("checkpoint_format") != "full"
    assert ("rank-00000.safetensors" in files(out, 4)) == cut


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_whole_tensors_go_on_in_pieces_at_other_stages(
    full: Artifact, keypad_shards: Artifact, tmp_path: Path, stage: int
):
    out = stopped(full, tmp_path / "model", 2)
    run(keypad_shards, out, 2, zero={"stage": stage})
    assert losses(out) == pytest.approx(losses(full.path), rel=1e-5)
    assert "rank-00001.safetensors" in files(out, 4)
    for name, tensor in tensors(full.path, 4).items():
        assert torch.allclose(tensors(out, 4)[name], tensor, atol=1e-5), name


@pytest.mark.slow  # each boundary is killed in tests/train/test_checkpoint.py, too, without a training around it
@pytest.mark.parametrize("boundary", range(1, 8))
def test_ranks_killed_while_they_save_go_on_from_a_good_one(
    full: Artifact, keypad_shards: Artifact, tmp_path: Path, boundary: int
):
    """All of them, when one is at a boundary of its files: before the folder, two files and two words, state, rename."""
    out = stopped(full, tmp_path / "model", 2)
    hold = Hold(tmp_path / "hold", checkpoint.POINT, boundary)
    struck = Training(keypad_shards, out, 2, BASE, **hold.environment)
    struck.until("a save that is held", hold.pid)
    struck.kill()
    assert VARIABLE in hold.environment and saved(out) == (4 if boundary == 7 else 2)
    assert run(keypad_shards, out, 2).digest == full.digest and losses(out) == losses(full.path)
    assert not list((out / "checkpoints").glob(".*"))


def test_a_rank_that_cannot_write_its_piece_ends_all_and_nobody_waits_for_it(
    full: Artifact, keypad_shards: Artifact, tmp_path: Path
):
    """A file takes the place of the folder while one rank is held between its file and its word."""
    out = stopped(full, tmp_path / "model", 2)
    hold = Hold(tmp_path / "hold", checkpoint.POINT, 2)
    config = {**BASE, "steps": 4, "save_every": 3}
    struck = Training(keypad_shards, out, 2, config, **hold.environment)
    struck.until("a file of one rank", hold.pid)
    for folder in (out / "checkpoints").glob(".*.tmp"):
        shutil.rmtree(folder)
        folder.touch()
    hold.go()
    assert struck.end() not in (0, 4)
    assert ".step-00000003." in struck.words() and "does not see all" not in struck.words()
    assert "Traceback" not in struck.words() and checkpoint.steps(out / "checkpoints") == {2}
    assert run(keypad_shards, out, 2).digest == full.digest and losses(out) == losses(full.path)


@pytest.mark.parametrize(
    ("asked", "stage", "count", "size", "wanted"),
    [
        ("auto", 2, 2, LARGE + 1, True), ("auto", 2, 2, LARGE, False), ("auto", 0, 2, LARGE + 1, False),
        ("auto", 3, 1, LARGE + 1, False), ("full", 3, 8, LARGE + 1, False), ("sharded", 1, 2, 1, True),
        ("sharded", 0, 2, 1, False), ("sharded", 3, 1, 1, False),
    ],
)  # fmt: skip
def test_pieces_are_written_where_there_are_any_and_it_pays(
    asked: str, stage: int, count: int, size: int, wanted: bool
):
    config = parse(LoopConfig, {"checkpoint_format": asked, "zero": {"stage": stage}}, "test")
    assert is_sharded(config, count, size) is wanted
