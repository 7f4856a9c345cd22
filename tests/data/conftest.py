"""A small shard set of three sources: short questions, longer texts, and pictures with sound."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmlm.artifacts import Artifact
from mmlm.config import parse
from mmlm.corpus.records import Part, Record, Target
from mmlm.shards.config import ShardConfig
from mmlm.shards.shard import shard
from tests.shards.conftest import write_manifest, write_wav

TASKS: list[dict] = [
    {"name": "chat", "has_text": True},
    {"name": "digit", "labels": [str(n) for n in range(10)]},
    {"name": "story", "has_text": True},
]


def make_mixed(data: Path) -> list[Record]:
    """120 chats, 40 stories of 20 to 2,000 characters, 30 digits with a picture and a tone; a quarter of each is for testing."""
    rng = np.random.default_rng(3)
    data.mkdir(parents=True, exist_ok=True)
    words = ["red", "green", "blue", "small", "tree", "house", "runs", "sings", "sees", "under", "the", "two"]
    records = []

    def add(name: str, number: int, parts: list[Part], task: str, target: Target) -> None:
        hashed = "".join(p.text or "" for p in parts) + str(target)
        split = "test" if number % 4 == 3 else "train"
        name = f"{name}/{number:04d}"
        records.append(
            Record(
                name,
                tuple(parts),
                task,
                target,
                split=split,
                group=name,
                source=name.split("/")[0],
                content_hash=hashed,
            )
        )

    def text(size: int) -> str:
        return " ".join(rng.choice(words, size))

    for n in range(120):
        add(
            "chat",
            n,
            [Part("text", text=text(int(rng.integers(2, 9))))],
            "chat",
            Target(text=text(int(rng.integers(1, 9)))),
        )
    for n in range(40):
        add("story", n, [Part("text", text="tell")], "story", Target(text=text(int(rng.integers(4, 400)))))
    for n in range(30):
        Image.fromarray(rng.integers(0, 256, (32, 32), np.uint8)).save(data / f"{n}.png")
        tone = np.sin(np.arange(int(rng.integers(2000, 8000))) * 0.2 * (1 + n % 10))
        write_wav(data / f"{n}.wav", 0.5 * tone, 16000)
        parts = [Part("text", text="which"), Part("image", uri=f"{n}.png"), Part("audio", uri=f"{n}.wav")]
        add("digit", n, parts, "digit", Target(label=str(n % 10)))
    return records


CONFIG = {
    "features": {
        "tokenizer": {"vocab_size": 300},
        "max_len": 64,
        "on_long": "keep",
        "image": {"size": 16, "patch": 8, "channels": 1},
        "audio": {"n_mels": 40, "max_seconds": 0.5},
    },
    "shard_records": 25,
    "error_budget": 0.5,
    "ray_from": 10**9,
}


def make_shards(folder: Path, **changes: object) -> Artifact:
    """The mixed corpus, sharded into `folder`/shards; eight training shards or so."""
    manifest = write_manifest(folder / "manifest", make_mixed(folder / "raw"), TASKS)
    config = {**CONFIG, "features": {**CONFIG["features"], **changes}}  # type: ignore[dict-item]
    return shard(
        parse(ShardConfig, config, "test"),
        manifest,
        data=folder / "raw",
        out=folder / "shards",
        workers=1,
        tracker=None,
    )


@pytest.fixture(scope="session")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_shards(tmp_path_factory.mktemp("mixed"))
