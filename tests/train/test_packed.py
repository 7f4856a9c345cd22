"""Training on packed sequences of a mixture: the same losses on one rank, on two with workers, and after a stop."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mmlm import artifacts
from mmlm.artifacts import Artifact
from mmlm.config import parse
from mmlm.data.plan import FOLDER
from mmlm.launch.local import ranks
from mmlm.tracking import NullTracker
from mmlm.train.config import TrainConfig
from mmlm.train.train import train
from tests.data.conftest import make_shards
from tests.data.test_loader import PACKED, damage, loader
from tests.train.runs import stopped

CONFIG: dict[str, Any] = {
    "steps": 4, "save_every": 2, "log_every": 1, "precision": "fp32",
    "model": {"width": 32, "layers": 1, "heads": 2, "attention": "prefix"}, "data": PACKED,
}  # fmt: skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_shards(tmp_path_factory.mktemp("mixed"))


def losses(shards: Artifact, out: Path, count: int, **changes: Any) -> list[float]:
    config = parse(TrainConfig, {**CONFIG, **changes}, "test")
    train(config, shards, out=out, launch=ranks(count), tracker=NullTracker())
    return [json.loads(line)["metrics"]["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_packed_training_is_the_same_however_it_is_shared_out(
    shards: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    alone = losses(shards, tmp_path / "alone", 1)
    monkeypatch.setenv("MMLM_DATA_WORKERS", "1")
    pair = losses(shards, tmp_path / "pair", 2, accumulate=2)
    assert alone == pytest.approx(pair, rel=1e-4)
    said = (tmp_path / "pair" / "logs" / "rank-0.log").read_text()
    assert "padding" in said and "mixture: story: 25.0% of 4 batches" in said


def test_records_that_cannot_be_packed_are_in_the_log_the_figures_and_the_counts(shards: Artifact, tmp_path: Path):
    folder = Path(shutil.copytree(shards.path, tmp_path / "shards", ignore=shutil.ignore_patterns(FOLDER)))
    keys = [damage(folder, n) for n in (2, 9)]
    config = parse(TrainConfig, {**CONFIG, "steps": 2}, "test")
    made = train(config, artifacts.read(folder), out=tmp_path / "model", launch=ranks(1), tracker=NullTracker())
    assert made.counts["damaged"] == 2
    rows = [json.loads(line)["metrics"] for line in (made.path / "metrics.jsonl").read_text().splitlines()]
    assert [row["damaged"] for row in rows] == [2.0, 2.0]
    said = (made.path / "logs" / "rank-0.log").read_text()
    (told,) = (line for line in said.splitlines() if "and left out; such records of" in line)  # the probe has stand-ins
    assert f"/{keys[0]} is damaged" in told and told.endswith(": 2")


def test_shards_that_are_repaired_in_mid_training_cost_nothing(shards: Artifact, tmp_path: Path):
    folder = Path(shutil.copytree(shards.path, tmp_path / "shards", ignore=shutil.ignore_patterns(FOLDER)))
    sound = {path: path.read_bytes() for path in folder.glob("train-*.tar")}
    damage(folder, 2)
    wanted = losses(artifacts.read(folder), tmp_path / "model", 1)
    out = stopped(artifacts.read(tmp_path / "model"), tmp_path / "again", 2)
    for path, data in sound.items():
        path.write_bytes(data)
    whole = loader(folder, PACKED)  # of another training; the plan is made anew
    assert whole.left_out == 0
    assert losses(artifacts.read(folder), out, 1) == wanted
    assert artifacts.read(out).counts["damaged"] == 1
    data = json.loads((out / "checkpoints" / "step-00000004" / "state.json").read_text())["data"]
    assert data["pack"] != whole.state()["pack"]
    said = (out / "logs" / "rank-0.log").read_text()
    assert "1 records were damaged when this training was begun; it goes on without them" in said
