"""What a pretrained encoder made of pictures and sounds, read through a projector in place of patches and mel frames."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from mmlm.data.collate import collate, field_rows, pack
from mmlm.data.config import AugmentConfig, DataConfig
from mmlm.data.loader import Loader
from mmlm.data.modalities import keep_modalities
from mmlm.data.reader import ShardReader
from mmlm.errors import ConfigError, DataError
from mmlm.features.encode import opened_length
from mmlm.features.sample import Sample
from mmlm.features.spec import EncoderSpec
from mmlm.launch import local
from mmlm.model.config import ModelConfig
from mmlm.model.flops import Shape, forward_flops
from mmlm.model.transformer import FusedTransformer
from mmlm.shards.shard import shard
from mmlm.train.config import AdamWConfig, TrainConfig
from mmlm.train.train import train
from mmlm.world import World
from tests.shards.conftest import make_records, write_manifest
from tests.shards.test_encoders import configured, save_vit
from tests.small import SPEC, sample

ENCODERS = {
    "image": EncoderSpec(digest="x", dim=6, tokens=5, read=True),
    "audio": EncoderSpec(digest="y", dim=4, tokens=9, read=True),
}
READING = SPEC.model_copy(update={"encoders": ENCODERS})


def encoded(seed: int, given: tuple[str, ...] = ("image", "audio")) -> Sample:
    rng = np.random.default_rng(seed)
    features = {
        "image": [rng.normal(size=(5, 6)).astype(np.float16)],
        "audio": [rng.normal(size=(int(rng.integers(2, 10)), 4)).astype(np.float16)],
    }
    return dataclasses.replace(
        sample(seed, given), features={kind: features[kind] for kind in given if kind in features}
    )


def net() -> FusedTransformer:
    torch.manual_seed(0)
    config = ModelConfig(width=32, layers=1, heads=2, image_stem="conv")
    return FusedTransformer(config, READING, len(field_rows(READING))).eval()


def test_the_features_are_the_rows_that_the_model_reads():
    one = encoded(0)
    batch = collate([one], READING)
    assert torch.equal(batch.patches_PD, torch.from_numpy(one.features["image"][0].astype(np.float32)))
    assert batch.mel_at_M.tolist() == list(range(len(one.features["audio"][0])))
    assert int(batch.valid_BT.sum()) == len(one.tokens) - 2 + 5 + len(one.features["audio"][0])
    assert opened_length(one, READING) == len(one.tokens) - 2 + 5 + 9, "planned at its most"
    model = net()
    assert model.image is not None and model.image.project.weight.shape == (32, 6)
    moved = dataclasses.replace(one, features={**one.features, "image": [one.features["image"][0] + 1]})
    assert not torch.allclose(model(batch).label_RC, model(collate([moved], READING)).label_RC, atol=1e-3)
    other = dataclasses.replace(one, images=[255 - one.images[0]])
    assert torch.equal(model(batch).label_RC, model(collate([other], READING)).label_RC), "pixels are not looked at"
    assert forward_flops(model.config, READING, Shape.of(batch)) > 0


def test_packed_equals_alone_and_a_missing_modality_leaves_zero_gradients():
    model = net()
    samples = [
        encoded(0),
        encoded(1, ("audio",)),
        sample(2, ()),
        encoded(3, ("image",)),
        keep_modalities(encoded(4), {"image"}),
    ]
    assert samples[4].features.keys() == {"image"}
    together = model(pack([samples[:2], samples[2:]], READING, 96)).label_RC
    alone = torch.cat([model(collate([s], READING)).label_RC for s in samples])
    assert torch.allclose(together, alone, atol=1e-5)
    model(collate([encoded(5, ("image",))], READING)).label_RC.sum().backward()
    assert model.audio is not None and model.image is not None
    assert all(p.grad is not None and not p.grad.any() for p in model.audio.parameters())
    assert all(p.grad is not None and p.grad.any() for p in model.image.parameters())


def test_a_picture_without_its_features_is_told():
    with pytest.raises(DataError, match="pretrained encoder"):
        collate([sample(0, ("image",))], READING)


def test_specs_whose_features_are_not_read_keep_their_digest():
    stored = {kind: one.model_copy(update={"read": False}) for kind, one in ENCODERS.items()}
    digests = {SPEC.digest, READING.digest, SPEC.model_copy(update={"encoders": stored}).digest}
    assert len(digests) == 3


def test_shards_of_an_encoder_become_batches_of_its_features(tmp_path: Path):
    records = make_records(tmp_path / "data")
    manifest = write_manifest(tmp_path / "manifest", records)
    config = configured({"image": save_vit(tmp_path / "vit")}, read=True)
    shards = shard(config, manifest, data=tmp_path / "data", out=tmp_path / "shards", workers=1, tracker=None)
    reader = ShardReader(shards.path, ("train",))
    assert reader.spec.encoder("image") is not None and reader.spec.encoder("audio") is None
    pictured = next(i for i in range(len(reader)) if reader[i].images)
    glance = reader.glance(pictured)
    assert glance is not None and glance.length == opened_length(reader[pictured], reader.spec)
    batch = Loader(shards.path, DataConfig(batch=4, modality_dropout=0.0), 0, World(0, 1)).batch(0)
    assert batch.patches_PD.shape[1] == 32
    for augment in ({"shift": 2, "turn": 5.0}, {"zoom": (0.9, 1.1)}):
        config_of = DataConfig(batch=4, augment=AugmentConfig(**augment))
        with pytest.raises(ConfigError, match=rf"augment\.{next(iter(augment))}.* encoder made of each image"):
            Loader(shards.path, config_of, 0, World(0, 1))
        training = TrainConfig(optimizer=AdamWConfig(lr=1e-3), data=config_of)
        with pytest.raises(ConfigError, match="read: false"):
            train(training, shards, out=tmp_path / next(iter(augment)), launch=local.inprocess(), tracker=None)
    Loader(shards.path, DataConfig(batch=4, augment=AugmentConfig(time_mask=0.2)), 0, World(0, 1)).batch(0)
    torch.manual_seed(0)
    model = FusedTransformer(ModelConfig(width=32, layers=1, heads=2), reader.spec, len(field_rows(reader.spec)))
    assert torch.isfinite(model(batch).label_RC).all()
