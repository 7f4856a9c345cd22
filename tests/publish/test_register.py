"""The verb register on a real SQLite registry."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mmlm import artifacts, tracking_store
from mmlm.errors import ArtifactError
from mmlm.publish import challenge, gate
from mmlm.publish.answering import Responder
from mmlm.publish.config import GateConfig, RegisterConfig
from mmlm.publish.register import register, still_registered
from mmlm.tracking import NullTracker, Tracker

if TYPE_CHECKING:
    from tests.publish.conftest import World


class Registry:
    """One registry and the calls of `register` on it."""

    def __init__(self, world: World, root: Path) -> None:
        self.world, self.root = world, root
        self.uri = f"sqlite:///{root}/mlflow.db"

    def __call__(self, out: str, seed: int, report: Any, tracker: Any = None, **gate_settings: Any) -> dict[str, Any]:
        w = self.world
        config = RegisterConfig(gate=GateConfig(**gate_settings))
        with tracker or Tracker.start(self.uri, story="demo", out=self.root) as tracking:
            self.artifact = register(
                config, story="demo", checkpoint=w.checkpoint(seed), report=report, shards=w.shards,
                manifest=w.manifest, data=w.data, out=self.root / out, tracker=tracking, tracking_uri=self.uri,
            )  # fmt: skip
        found: dict[str, Any] = json.loads((self.root / out / "registered.json").read_text())
        return found

    @property
    def client(self) -> Any:
        return tracking_store.open_client(self.uri)

    @property
    def champion(self) -> int:
        return int(self.client.get_model_version_by_alias("mmlm-demo", "champion").version)

    @property
    def versions(self) -> list[int]:
        return sorted(int(v.version) for v in self.client.search_model_versions("name='mmlm-demo'"))


@pytest.fixture(scope="module")
def registry(world: World, tmp_path_factory: pytest.TempPathFactory) -> Registry:
    return Registry(world, tmp_path_factory.mktemp("registry"))


def test_versions_and_the_champion(registry: Registry, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    first = registry("one", 1, world.report("report-1", set(range(12))))
    assert first["model_uri"] == "models:/mmlm-demo/1"
    assert first["promoted"]
    assert registry.champion == 1
    version = registry.client.get_model_version("mmlm-demo", "1")
    assert version.tags["digest"] == world.checkpoint(1).digest
    run = registry.client.get_run(version.run_id)
    assert run.info.status == "FINISHED"
    assert "mlflow.parentRunId" in run.data.tags
    assert {"gate.json", "registered.json", "artifact.json", "gate"} <= {
        f.path for f in registry.client.list_artifacts(version.run_id)
    }
    made = (registry.root / "one/artifact.json").stat().st_mtime_ns
    assert registry("one", 1, artifacts.read(world.root / "report-1")) == first
    assert (registry.root / "one/artifact.json").stat().st_mtime_ns == made, "registered twice"

    worse = registry("two", 2, world.report("report-2", set(range(4))))
    assert worse["model_uri"] == "models:/mmlm-demo/2"
    assert not worse["promoted"]
    assert "0.200 (n 20" in worse["reason"]
    assert registry.champion == 1
    assert registry.client.get_model_version("mmlm-demo", "2").description == worse["reason"]

    better = registry("three", 3, world.report("report-3", set(range(19))))
    assert better["promoted"]
    assert registry.champion == 3

    # killed between the registry and artifact.json: the rerun finds the version it made
    (registry.root / "three/artifact.json").unlink()
    shutil.rmtree(registry.root / "three")
    again = registry("three", 3, artifacts.read(world.root / "report-3"))
    assert again["model_uri"] == "models:/mmlm-demo/3"
    assert registry.versions == [1, 2, 3]


def test_another_test_set_makes_the_champion_answer_again(
    registry: Registry, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    real = challenge.answers_to

    def noted(model: str, *rest: Any, **named: Any) -> Any:
        asked.append(model)
        return real(model, *rest, **named)

    monkeypatch.setattr("mmlm.publish.register.answers_to", noted)
    report = world.report("report-4", {1}, digest="another")
    before = registry.champion
    told = registry("four", 4, report)
    assert asked == [f"models:/mmlm-demo/{before}"]
    predictions = gate.read_predictions(report.path / "predictions.parquet", "student")
    row = gate.Row("digit", "accuracy", "text+image+audio")
    mine = gate.select(predictions, row)
    answered = real(asked[0], registry.uri, mine, row, manifest=world.manifest.path, data=world.data)
    questions = [
        {"image": str(world.data / f"{i}.png"), "audio": str(world.data / f"{i}.wav"), "text": q}
        for i, q in enumerate(["Which number is it?", "这是哪个数字？"] * 10)
    ]
    direct = Responder.load(asked[0], tracking_uri=registry.uri).answer(questions)
    assert [a["answer"] for a in answered] == [a["answer"] for a in direct]
    assert [a["correct"] for a in answered] == [a["answer"] == str(i % 10) for i, a in enumerate(direct)]
    rate = sum(a["correct"] for a in answered) / 20
    assert f"against {rate:.3f}" in told["reason"]


def test_a_broken_champion_is_named(registry: Registry, world: World, tmp_path: Path) -> None:
    version = registry.client.get_model_version("mmlm-demo", str(registry.champion))
    files = Path(tracking_store_path(registry, version))
    kept = (files / "artifacts/checkpoint/model.safetensors").read_bytes()
    (files / "artifacts/checkpoint/model.safetensors").write_bytes(b"broken")
    try:
        with pytest.raises(ArtifactError, match="champion"):
            registry("five", 5, world.report("report-5", {1, 2}, digest="third"))
        assert not (registry.root / "five/artifact.json").exists()
    finally:
        (files / "artifacts/checkpoint/model.safetensors").write_bytes(kept)


def tracking_store_path(registry: Registry, version: Any) -> str:
    from mmlm.publish.locate import download

    return str(download(f"models:/mmlm-demo/{version.version}", registry.uri))


def test_without_a_tracker_and_with_another_name(world: World, registry: Registry) -> None:
    w = world
    artifact = register(
        RegisterConfig(name="other"), story="demo", checkpoint=w.checkpoint(1), report=w.report("report-6", {3}),
        shards=w.shards, manifest=w.manifest, data=w.data, out=registry.root / "six", tracker=NullTracker(),
        tracking_uri=registry.uri,
    )  # fmt: skip
    assert artifact.counts == {"version": 1, "promoted": True}
    answer = Responder.load("models:/other@champion", tracking_uri=registry.uri).answer([{"text": "?"}])
    assert "answer" in answer[0]
    with pytest.raises(ArtifactError, match="nosuch"):
        Responder.load("models:/nosuch@champion", tracking_uri=registry.uri)


def test_whether_it_is_still_registered(registry: Registry, tmp_path: Path) -> None:
    artifact = artifacts.read(registry.root / "six")
    assert still_registered(artifact, registry.uri)
    assert not still_registered(artifact, f"sqlite:///{tmp_path}/none.db")
    assert not (tmp_path / "none.db").exists()
    tracking_store.open_client(f"sqlite:///{tmp_path}/empty.db")
    assert not still_registered(artifact, f"sqlite:///{tmp_path}/empty.db")
    registry.client.delete_registered_model_alias("other", "champion")
    registry.client.delete_model_version("other", "1")
    assert not still_registered(artifact, registry.uri)
