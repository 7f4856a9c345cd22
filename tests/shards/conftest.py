"""Small real corpora: pictures and tones as files, a manifest over them, and the config that shards it."""

from __future__ import annotations

import math
import wave
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from mmlm import artifacts
from mmlm.artifacts import Artifact
from mmlm.config import Config
from mmlm.corpus.records import REFUSED, SCHEMA, Part, Record, Target, to_row
from mmlm.features.config import FeaturesConfig, TokenizerConfig
from mmlm.features.spec import AudioSpec, ImageSpec
from mmlm.shards.config import ShardConfig
from mmlm.storage import sha256_file

CONFIG = ShardConfig(
    features=FeaturesConfig(
        tokenizer=TokenizerConfig(vocab_size=300),
        max_len=64,
        image=ImageSpec(size=16, patch=8, channels=1),
        audio=AudioSpec(n_mels=40, max_seconds=0.5),
    ),
    shard_records=10,
    error_budget=0.2,
    ray_from=1_000_000,
)
TASKS = [{"name": "digit", "labels": list("0123456789"), "langs": ["en", "zh"], "questions": ["Which number is it?"]}]


class ByHand(Config):
    """Stands where a scan's config stands."""

    listing: str


def write_wav(path: Path, samples: np.ndarray, rate: int = 16000) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())


def make_records(data: Path, count: int = 45, seed: int = 0) -> list[Record]:
    """`count` records over files that are written below `data`: two of three have a picture, two of three a tone."""
    rng = np.random.default_rng(seed)
    data.mkdir(parents=True, exist_ok=True)
    records = []
    for i in range(count):
        digit = str(i % 10)
        parts = [Part("text", text=("Which number is it?", "这是哪个数字？")[i % 2])]
        if i % 3 != 1:
            Image.fromarray(rng.integers(0, 256, (32, 32), np.uint8)).save(data / f"{i}.png")
            parts.append(Part("image", uri=f"{i}.png"))
        if i % 3 != 2:
            tone = np.sin(2 * math.pi * (400 + 100 * (i % 10)) * np.arange(4000) / 8000)
            write_wav(data / f"{i}.wav", 0.5 * tone, 8000)
            parts.append(Part("audio", uri=f"{i}.wav"))
        hashed = "".join(sha256_file(data / part.uri) for part in parts if part.uri)
        records.append(
            Record(
                f"keypad/{i:04d}",
                tuple(parts),
                "digit",
                Target(label=digit),
                split=("train", "train", "test")[i % 3],
                group=str(i),
                lang=("en", "zh")[i % 2],
                source="keypad.jsonl",
                content_hash=hashed,
            )
        )
    return records


def write_manifest(
    folder: Path, records: list[Record], tasks: list[dict] | None = None, fields: dict | None = None
) -> Artifact:
    """A finished manifest that holds `records`."""
    rows = [to_row(record) for record in sorted(records, key=lambda record: record.id)]
    work = artifacts.begin(folder, "manifest", recipe=1, config=ByHand(listing=str(hash(tuple(r["id"] for r in rows)))))
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), folder / "records-00000.parquet")
    pq.write_table(pa.Table.from_pylist([], schema=REFUSED), folder / "refused.parquet")
    extra = {"tasks": tasks or TASKS, **({"fields": fields} if fields else {})}
    return work.finish(counts={"kept": len(rows)}, digest_of=["records-00000.parquet"], extra=extra)


def shas(folder: Path) -> dict[str, str]:
    """File name → sha256 of every file that makes up a shard set's content."""
    names = ["manifest.parquet", "quarantine.parquet", "feature_spec.json", "tokenizer.json"]
    paths = [*folder.glob("*.tar"), *folder.glob("*.index.parquet"), *(folder / name for name in names)]
    return {path.name: sha256_file(path) for path in sorted(paths)}
