"""Three corpora of 40 records, one for each modality, that give 8 shards each; and what an undisturbed run makes of them."""

from __future__ import annotations

import json
import math
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mmlm.artifacts import Artifact
from mmlm.corpus.records import Part, Record, Target
from mmlm.features.config import FeaturesConfig, TokenizerConfig
from mmlm.features.spec import AudioSpec, ImageSpec
from mmlm.shards.config import ShardConfig
from mmlm.shards.shard import shard
from mmlm.storage import sha256_file
from tests.shards.conftest import shas, write_manifest, write_wav

MODALITIES = ("text", "image", "audio")
RECORDS = 40
IN_ONE_SHARD = 5
NEVER = 10**6
"""As `ray_from`: everything in one process."""
WORDS = [
    "red",
    "green",
    "blue",
    "one",
    "two",
    "three",
    "rain",
    "sun",
    "wind",
    "and",
    "not",
    "一",
    "二",
    "三",
    "红",
    "绿",
    "你好",
]


def config(ray_from: int = NEVER) -> ShardConfig:
    """`ray_from` RECORDS: a whole run goes to Ray workers, a rerun that finds a shard done is one process."""
    features = FeaturesConfig(
        tokenizer=TokenizerConfig(vocab_size=300),
        max_len=512,
        image=ImageSpec(size=16, patch=8, channels=1),
        audio=AudioSpec(n_mels=40, max_seconds=0.5),
    )
    return ShardConfig(features=features, shard_records=IN_ONE_SHARD, ray_from=ray_from)


@dataclass(frozen=True)
class Corpus:
    manifest: Artifact
    data: Path
    undisturbed: Path
    """The shard set that an undisturbed run gives."""

    @property
    def shas(self) -> dict[str, str]:
        return shas(self.undisturbed)


def make(root: Path, modality: str) -> Corpus:
    """Files, manifest and undisturbed shards of the corpus of one modality, below `root`."""
    data = root / "data"
    data.mkdir(parents=True)
    rng = np.random.default_rng(MODALITIES.index(modality))
    records = [_record(data, modality, i, rng) for i in range(RECORDS)]
    manifest = write_manifest(root / "manifest", records)
    return Corpus(manifest, data, shard(config(), manifest, data=data, out=root / "undisturbed").path)


def _record(data: Path, modality: str, i: int, rng: np.random.Generator) -> Record:
    parts = [Part("text", text="Which number is it?")]
    if modality == "text":
        parts.append(Part("text", "context", " ".join(rng.choice(WORDS, 40))))
    elif modality == "image":
        Image.fromarray(rng.integers(0, 256, (32, 32), np.uint8)).save(data / f"{i}.png")
        parts.append(Part("image", uri=f"{i}.png"))
    else:
        tone = np.sin(2 * math.pi * (400 + 20 * i) * np.arange(4000) / 8000)
        write_wav(data / f"{i}.wav", 0.5 * tone, 8000)
        parts.append(Part("audio", uri=f"{i}.wav"))
    hashed = "".join(sha256_file(data / part.uri) for part in parts if part.uri)
    return Record(
        f"{modality}/{i:03d}", tuple(parts), "digit", Target(label=str(i % 10)), split="train", group=str(i),
        lang="en", source="made.jsonl", content_hash=hashed,
    )  # fmt: skip


def ids(shards: Path) -> list[str]:
    """The id of every sample in every tar of the folder, read by the standard library."""
    found = []
    for path in sorted(shards.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    inside = tar.extractfile(member)
                    assert inside
                    found.append(json.loads(inside.read())["id"])
    return sorted(found)
