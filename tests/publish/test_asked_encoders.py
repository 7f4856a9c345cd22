"""A question's picture goes through the encoder that the shard set was made with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from mmlm.cli import main
from mmlm.data.reader import ShardReader
from mmlm.errors import ConfigError
from mmlm.features.spec import load as load_spec
from mmlm.model.config import ModelConfig
from mmlm.publish.answering import Responder
from mmlm.publish.asked_encoders import PLACES, places
from mmlm.shards.shard import shard
from mmlm.train import weights
from tests.shards.conftest import make_records, write_manifest
from tests.shards.test_encoders import configured, save_vit, save_whisper


def test_a_picture_is_encoded_as_it_was_for_the_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    records = make_records(tmp_path / "data")
    manifest = write_manifest(tmp_path / "manifest", records)
    vit = save_vit(tmp_path / "vit")
    config = configured({"image": vit}, read=True)
    shards = shard(config, manifest, data=tmp_path / "data", out=tmp_path / "shards", workers=1, tracker=None)
    reader = ShardReader(shards.path, ("train", "test", "val"))
    stored = next(reader[i] for i in range(len(reader)) if reader[i].images)
    torch.manual_seed(0)
    model = weights.build(ModelConfig(width=16, layers=1, heads=2), reader.spec)
    folder = tmp_path / "model"
    folder.mkdir()
    weights.save_model(folder, model.state_dict(), model.config, shards.path)
    record = next(r for r in records if r.id == stored.id)
    picture = next(p for p in record.parts if p.kind == "image")
    data = picture.data or (tmp_path / "data" / str(picture.uri)).read_bytes()

    monkeypatch.delenv(PLACES, raising=False)
    answer = Responder(folder).answer([{"image": data}])[0]
    assert "not known where that lies; ask without image, or start with --encoder image=FOLDER" in answer["error"]
    monkeypatch.setenv(PLACES, f"image={vit}")
    responder = Responder(folder)
    made = responder.sample({"image": data}).features["image"][0]
    assert made.shape == stored.features["image"][0].shape
    assert np.allclose(made, stored.features["image"][0], atol=1e-2)
    assert "error" not in responder.answer([{"image": data}])[0]

    other = save_vit(tmp_path / "other", seed=9)
    monkeypatch.setenv(PLACES, f"image={other}")
    with pytest.raises(ConfigError, match=r"has the digest .*wanted .*that of the shard set"):
        Responder(folder)
    with pytest.raises(ConfigError, match="wanted KIND=FOLDER"):
        places("video=/x")


@pytest.mark.parametrize("layer", ["last", "pooled"])
def test_an_answer_is_explained_by_the_tokens_of_the_encoders(
    tmp_path: Path, layer: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    records = make_records(tmp_path / "data")
    manifest = write_manifest(tmp_path / "manifest", records)
    folders = {"image": save_vit(tmp_path / "vit"), "audio": save_whisper(tmp_path / "whisper")}
    config = configured(folders, read=True, layer=layer)
    shards = shard(config, manifest, data=tmp_path / "data", out=tmp_path / "shards", workers=1, tracker=None)
    torch.manual_seed(0)
    model = weights.build(ModelConfig(width=16, layers=1, heads=2), load_spec(shards.path))
    folder = tmp_path / "model"
    folder.mkdir()
    weights.save_model(folder, model.state_dict(), model.config, shards.path)
    places = [flag for kind, path in folders.items() for flag in ("--encoder", f"{kind}={path}")]
    question = ["--image", str(tmp_path / "data" / "p.png"), "--audio", str(tmp_path / "data" / "p.wav")]
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (30, 20, 3), np.uint8)).save(question[1])
    soundfile.write(question[3], rng.normal(0, 0.1, 4800).astype(np.float32), 16000)

    monkeypatch.setenv(PLACES, "")
    asked = ["explain", "--model", str(folder), *question, "--out", str(tmp_path / "why"), "--json"]
    assert main(asked) == 2 and "not known where that lies" in capsys.readouterr().err
    assert main([*asked, *places]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["completeness"]["complete"]
    picture, sound = (next(p for p in found["parts"] if p["kind"] == kind) for kind in ("image", "audio"))
    side = 3 if layer == "last" else 1  # 24 pixels of patches of 8
    assert np.shape(picture["patches"]) == np.shape(picture["rollout"]) == (side, side)
    assert picture["rest"] != 0 if layer == "last" else picture["rest"] == 0  # the class token's
    assert picture["attribution"] == pytest.approx(np.sum(picture["patches"]) + picture["rest"], abs=1e-4)
    assert len(sound["frames"]) == 30 and len(sound["rollout"]) == (15 if layer == "last" else 1)
    pairs = np.reshape(sound["frames"], (15, 2))
    assert np.allclose(pairs[:, 0], pairs[:, 1], atol=1e-5) and sound["attribution"] != 0
    for name in ("0-picture.png", "1-sound.png"):
        assert Image.open(tmp_path / "why" / name).size[0] > 300
