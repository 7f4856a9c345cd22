"""A question's picture goes through the encoder that the shard set was made with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mmlm.data.reader import ShardReader
from mmlm.errors import ConfigError
from mmlm.model.config import ModelConfig
from mmlm.publish.answering import Responder
from mmlm.publish.asked_encoders import PLACES, places
from mmlm.shards.shard import shard
from mmlm.train import weights
from tests.shards.conftest import make_records, write_manifest
from tests.shards.test_encoders import configured, save_vit


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
