"""Padding that is left out: the same patches stay in plans, in training whatever is done to pictures, and in evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmlm.artifacts import Artifact
from mmlm.config import parse
from mmlm.corpus.records import Part, Record, Target
from mmlm.data.arrays import assemble
from mmlm.data.augment import augment
from mmlm.data.config import AugmentConfig, DataConfig
from mmlm.data.loader import Loader
from mmlm.data.modalities import keep_modalities
from mmlm.data.reader import ShardReader
from mmlm.errors import DataError
from mmlm.features.borders import with_borders
from mmlm.features.encode import opened_length
from mmlm.features.spec import FeatureSpec
from mmlm.shards import codec
from mmlm.shards.config import ShardConfig
from mmlm.shards.shard import shard
from mmlm.world import World
from tests.shards.conftest import write_manifest

KEPT = 16
"""Patches of 8 pixels of a picture of 64 by 16."""


def wide_shards(folder: Path, padding: str, max_len: int = 40, codec: str = "png") -> Artifact:
    """40 pictures four times as wide as high, 30 of them to learn from."""
    raw, rng, records = folder / "raw", np.random.default_rng(0), []
    raw.mkdir(parents=True)
    for n in range(40):
        Image.fromarray(rng.integers(0, 256, (16, 64, 3), np.uint8)).save(raw / f"{n}.png")
        parts = (Part("text", text="which"), Part("image", uri=f"{n}.png"))
        split = "train" if n % 4 else "test"
        records.append(
            Record(f"d/{n}", parts, "digit", Target(label=str(n % 10)), split=split, group=str(n), content_hash=str(n))
        )
    manifest = write_manifest(folder / "manifest", records, [{"name": "digit", "labels": [str(n) for n in range(10)]}])
    image = {"size": 64, "patch": 8, "channels": 3, "padding": padding}
    config = {
        "features": {"tokenizer": {"vocab_size": 300}, "max_len": max_len, "image": image}, "image_codec": codec,
        "ray_from": 10**9,
    }  # fmt: skip
    return shard(parse(ShardConfig, config, "test"), manifest, data=raw, out=folder / "shards", workers=1, tracker=None)


@pytest.fixture(scope="module")
def dropping(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return wide_shards(tmp_path_factory.mktemp("dropping"), "drop")


def loader(shards: Artifact, **data: object) -> Loader:
    given = {"batch": 8, "modality_dropout": 0, **data}
    return Loader(shards.path, parse(DataConfig, given, "test"), 0, World(), 20, quiet=True)


def test_records_are_refused_and_packed_by_the_positions_that_they_take(dropping: Artifact):
    assert dropping.counts["quarantined"] == 0, "64 patches would not have fitted into 40 positions"
    one = loader(dropping, pack={"kind": "best_fit", "length": 96})
    assert one.plan and len(one.plan.opened) == 30
    for row, i in enumerate(one.plan.sample.tolist()):
        found = one.reader[i]
        assert one.plan.opened[row] == opened_length(found, one.reader.spec) == len(found.tokens) - 1 + KEPT
    held = [int(batch.valid_BT.sum()) for batch in map(one.batch, range(one.plan.counts["sequences"]))]
    assert 1 - sum(held) / (len(held) * 8 * 96) == pytest.approx(one.plan.padding(), abs=0.02)
    assert one.plan.padding() < 0.2


@pytest.mark.parametrize(
    "changes", [{}, {"shift": 4}, {"turn": 20}, {"zoom": [0.7, 1.4]}, {"flip": True, "contrast": 0.3}]
)
def test_training_sees_the_patches_that_an_evaluation_sees(dropping: Artifact, changes: dict[str, object]):
    one = loader(dropping, augment=changes)
    asked = ShardReader(dropping.path, ("test",))
    expected = assemble([[asked[0]]], asked.spec)["patch_at_P"].tolist()
    assert expected == list(range(24, 40))
    for step in range(4):
        assert one.batch(step).patch_at_P.view(8, -1).tolist() == [expected] * 8


def without_borders(reader: ShardReader, i: int) -> dict[str, bytes]:
    """The members of a sample as they were written before borders were stored."""
    members = dict(reader.members(i))
    plain = json.loads(bytes(members["json"]))
    del plain["borders"]
    return {**members, "json": json.dumps(plain).encode()}


def test_shards_without_borders_are_planned_at_their_most_and_read_as_others(dropping: Artifact):
    reader = ShardReader(dropping.path, ("train",))
    old = codec.unpack(without_borders(reader, 0))
    assert old.borders == [] and reader[0].borders == [(3, 0)]
    most = codec.glance(without_borders(reader, 0), reader.spec).length
    assert most == opened_length(old, reader.spec) == len(old.tokens) - 1 + 64
    smeared = augment(with_borders(old, reader.spec), AugmentConfig(turn=20), np.random.default_rng(1))
    assert len(assemble([[smeared]], reader.spec)["patch_at_P"]) == KEPT
    assert keep_modalities(reader[0], {"context"}).borders == []


def test_broken_borders_are_refused(dropping: Artifact):
    reader = ShardReader(dropping.path, ("train",))
    for broken in ([[-1, 0]], [[1]], ["ab"], 7):
        plain = {**json.loads(bytes(reader.members(0)["json"])), "borders": broken}
        members = {**reader.members(0), "json": json.dumps(plain).encode()}
        with pytest.raises(DataError, match="cannot be read"):
            codec.unpack(members)
        with pytest.raises(DataError, match="cannot be read"):
            codec.glance(members, reader.spec)


def test_a_lossy_codec_drops_what_was_padding_before_it(tmp_path: Path):
    """What a served model is asked is no JPEG: it must see the same patches."""
    shards = wide_shards(tmp_path, "drop", codec="jpeg")
    assert {tuple(s.borders) for s in ShardReader(shards.path, ("train",))} == {((3, 0),)}


def test_samples_that_keep_padding_are_stored_as_before(tmp_path: Path):
    shards = wide_shards(tmp_path, "keep", 96)
    reader = ShardReader(shards.path, ("train",))
    assert "borders" not in json.loads(bytes(reader.members(0)["json"]))
    spec: FeatureSpec = reader.spec
    assert codec.glance(reader.members(0), spec).length == len(reader[0].tokens) - 1 + 64
