"""A tiny untrained checkpoint and everything that stands upstream of `register`, made of real parts."""

from __future__ import annotations

import io
import json
import math
import struct
import wave
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from mmlm import artifacts
from mmlm.artifacts import Artifact
from mmlm.config import Config
from mmlm.corpus.records import SCHEMA, Part, Record, Target, to_row
from mmlm.evals.predictions import PREDICTIONS
from mmlm.features import spec as feature_spec
from mmlm.features.config import TokenizerConfig
from mmlm.features.spec import AudioSpec, FeatureSpec, ImageSpec, TaskSpec
from mmlm.features.text import train_tokenizer
from mmlm.model.config import ModelConfig
from mmlm.train import weights

QUESTIONS = ["Which number is it?", "这是哪个数字？"]


class Settings(Config):
    seed: int = 0
    """Seed."""


def picture(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (16, 16), shade).save(file, "PNG")
    return file.getvalue()


def sound(hertz: float, seconds: float = 0.1) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as w:
        w.setnchannels(1)
        w.setsampwidth(2)
        w.setframerate(8000)
        n = int(8000 * seconds)
        w.writeframes(b"".join(struct.pack("<h", int(9000 * math.sin(hertz * 6.283 * i / 8000))) for i in range(n)))
    return file.getvalue()


@dataclass
class World:
    """The nouns upstream of `register`, and the folder of the media."""

    root: Path
    data: Path
    manifest: Artifact
    shards: Artifact
    picture = staticmethod(picture)
    sound = staticmethod(sound)

    def checkpoint(self, seed: int) -> Artifact:
        """An untrained student."""
        folder = self.root / f"student-{seed}"
        work = artifacts.begin(folder, "checkpoint", recipe=1, config=Settings(seed=seed))
        if work.artifact:
            return work.artifact
        torch.manual_seed(seed)
        config = ModelConfig(width=16, layers=1, heads=2)
        model = weights.build(config, feature_spec.load(self.shards.path))
        weights.save_model(folder, model.state_dict(), config, self.shards.path)
        return work.finish(counts={"parameters": 1}, digest_of=weights.FILES)

    def report(self, name: str, right: set[int], digest: str = "one") -> Artifact:
        """A report in which the student answered the test records numbered in `right` correctly."""
        work = artifacts.begin(self.root / name, "report", recipe=1, config=Settings(seed=len(right)))
        rows = [
            {
                "model": "student", "given": "text+image+audio", "split": "test", "id": f"r{i:02}", "group": f"g{i}",
                "task": "digit", "lang": "en", "label": str(i % 10), "predicted": str(i % 10) if i in right else "x",
                "score": 0.5, "correct": i in right, "answer": str(i % 10) if i in right else "x",
                "expected": str(i % 10),
            }
            for i in range(20)
        ]  # fmt: skip
        pq.write_table(pa.Table.from_pylist(rows, PREDICTIONS), work.path / "predictions.parquet")
        extra = {"test_digest": digest, "headline": {}, "story": "demo"}
        return work.finish(counts={}, digest_of=["predictions.parquet"], extra=extra)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Twenty test records with pictures and sounds, a spec with two tasks, a real tokenizer."""
    root = tmp_path_factory.mktemp("publish")
    data = root / "raw"
    data.mkdir()
    records = []
    for i in range(20):
        (data / f"{i}.png").write_bytes(picture(10 * i))
        (data / f"{i}.wav").write_bytes(sound(300 + 50 * i))
        parts = (Part("image", uri=f"{i}.png"), Part("audio", uri=f"{i}.wav"), Part("text", text=QUESTIONS[i % 2]))
        records.append(Record(f"r{i:02}", parts, "digit", Target(label=str(i % 10)), "test", f"g{i}", "en"))
    work = artifacts.begin(root / "manifest", "manifest", recipe=1, config=Settings())
    pq.write_table(pa.Table.from_pylist([to_row(r) for r in records], SCHEMA), work.path / "records-00000.parquet")
    manifest = work.finish(counts={"found": 20}, digest_of=["records-00000.parquet"])
    work = artifacts.begin(root / "shards", "shards", recipe=1, config=Settings(), parents={"manifest": manifest})
    tokenizer = train_tokenizer(QUESTIONS, TokenizerConfig(vocab_size=270))
    tokenizer.save(work.path)
    spec = FeatureSpec(
        vocab_size=tokenizer.vocab_size, tokenizer_digest=tokenizer.digest, max_len=128,
        image=ImageSpec(size=16, patch=8, channels=1), audio=AudioSpec(n_mels=16),
        tasks=[
            TaskSpec(name="digit", labels=[str(i) for i in range(10)], langs=["en", "zh"], questions=QUESTIONS),
            TaskSpec(name="tone", labels=["high", "low"], langs=["en"], questions=["Is the tone high or low?"]),
        ],
    )  # fmt: skip
    feature_spec.save(spec, work.path)
    (work.path / "note.json").write_text(json.dumps({}))
    return World(root, data, manifest, work.finish(counts={}, digest_of=["note.json"]))
