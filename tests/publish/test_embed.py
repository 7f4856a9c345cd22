"""Embeddings, from the command line and over HTTP: the model's own vectors, of length 1."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
import torch
from fastapi.testclient import TestClient

from mmlm.cli import main
from mmlm.data.collate import collate
from mmlm.data.modalities import alone
from mmlm.features import spec as feature_spec
from mmlm.model.baseline_config import CnnConfig
from mmlm.model.config import ModelConfig
from mmlm.publish import bundle
from mmlm.publish.answering import Responder
from mmlm.publish.locate import fluent
from mmlm.publish.serve import application
from mmlm.train import weights

if TYPE_CHECKING:
    from tests.publish.conftest import World


@pytest.fixture(scope="module")
def folder(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model with an embedding head."""
    folder = tmp_path_factory.mktemp("embedding")
    torch.manual_seed(3)
    config = ModelConfig(width=16, layers=1, heads=2, embedding=6)
    model = weights.build(config, feature_spec.load(world.shards.path))
    weights.save_model(folder, model.state_dict(), config, world.shards.path)
    return folder


def directly(folder: Path, media: dict[str, Any]) -> np.ndarray:
    """What the model makes of the media alone, without Responder.embed."""
    responder = Responder(folder)
    sample = responder.sample(media)
    sample = alone(sample, frozenset(sample.modalities))
    with torch.inference_mode():
        batch = collate([sample], responder.spec, with_answer=False)
        found: np.ndarray = responder.answerer.model(batch).embedding_RE[0].numpy()
    return found


def test_lines_become_the_vectors_of_the_model(
    world: World, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture, sound = str(world.data / "4.png"), str(world.data / "4.wav")
    rows = [{"image": picture}, {"audio": sound}, {"image": picture, "audio": sound}, {"text": "vier"}, {}]
    (tmp_path / "things.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["embed", "--model", str(folder), "--input", str(tmp_path / "things.jsonl")]) == 2
    *made, empty = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert "nothing to embed" in empty["error"]
    vectors = np.array([row["embedding"] for row in made])
    assert vectors.shape == (4, 6) and np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    for row, vector in zip(rows[:3], vectors, strict=False):
        assert np.allclose(vector, directly(folder, row), atol=1e-5)
    assert not np.allclose(vectors[0], vectors[1], atol=1e-2)


def test_the_server_gives_the_same_vectors(world: World, folder: Path) -> None:
    picture = (world.data / "4.png").read_bytes()
    client = TestClient(application(Responder(folder), "m"))
    assert client.get("/health").json()["embedding"] == 6
    reply = client.post("/embed", json={"image": base64.b64encode(picture).decode()})
    assert reply.status_code == 200
    assert np.allclose(reply.json()["embedding"], directly(folder, {"image": picture}), atol=1e-5)
    for body, sentence in (
        ({}, "nothing to embed"),
        ({"image": "/etc/passwd"}, "not base64"),
        ({"text": "4", "stream": True}, "unknown field `stream`; known: text, image, audio, fields"),
    ):
        reply = client.post("/embed", json=body)
        assert reply.status_code == 422 and sentence in reply.json()["error"]


def test_a_model_without_such_a_head_says_so(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    model = world.checkpoint(0).path
    client = TestClient(application(Responder(model), "m"))
    assert "embedding" not in client.get("/health").json()
    reply = client.post("/embed", json={"text": "4"})
    assert reply.status_code == 422 and "train with model.embedding" in reply.json()["error"]
    assert main(["embed", "--model", str(model), "--text", "4"]) == 2
    assert "makes no embeddings" in capsys.readouterr().err


def test_a_model_that_reads_no_text_says_so(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = CnnConfig(channels=(4,), width=8, embedding=6)
    spec = feature_spec.load(world.shards.path)
    weights.save_model(tmp_path, weights.build(config, spec).state_dict(), config, world.shards.path)
    picture = str(world.data / "4.png")
    rows = [{"text": "vier"}, {"image": picture, "text": "vier"}, {"image": picture}, {"imgae": picture}]
    things = tmp_path / "things.jsonl"
    things.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["embed", "--model", str(tmp_path), "--input", str(things)]) == 2
    text, both, alone, misspelt = map(json.loads, capsys.readouterr().out.splitlines())
    assert text == {"error": "there is only text, and this model reads none; wanted image or audio"}
    assert "not read" in both["note"] and both["embedding"] == alone["embedding"] and "note" not in alone
    assert "did you mean `image`?); known: text, image, audio, fields" in misspelt["error"]


def test_the_registered_model_gives_the_same_vectors(world: World, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    table = pd.DataFrame([{"image": str(world.data / "4.png")}, {"text": "vier"}, {"image": "/gone.png"}])
    with fluent(f"sqlite:///{tmp_path}/mlflow.db") as mlflow:
        experiment = mlflow.create_experiment("e", artifact_location=(tmp_path / "artifacts").as_uri())
        with mlflow.start_run(experiment_id=experiment):
            info = bundle.log(mlflow, folder, tmp_path / "code", example=table[["text"]][1:2], metadata={})
        model = mlflow.pyfunc.load_model(info.model_uri)
    made = model.predict(table, params={"embed": True})
    assert list(made.columns) == ["embedding", "error"]
    assert np.allclose(made["embedding"][0], directly(folder, {"image": table["image"][0]}), atol=1e-5)
    assert len(made["embedding"][1]) == 6 and made["embedding"][2] is None and "gone.png" in made["error"][2]
    assert "embedding" not in model.predict(table) and isinstance(model.predict(table)["answer"][1], str)
