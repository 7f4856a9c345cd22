"""What only the order of a video's frames, or of a record's sounds, decides is learnt from real files."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch.nn import functional as F

from mmlm.corpus.records import Part, Record, Target
from mmlm.data.collate import collate
from mmlm.features.config import TokenizerConfig
from mmlm.features.encode import Encoder
from mmlm.features.sample import Sample
from mmlm.features.spec import AUDIO, IMAGE, AudioSpec, FeatureSpec, ImageSpec, TaskSpec, VideoSpec
from mmlm.features.text import train_tokenizer
from mmlm.model.config import ModelConfig
from mmlm.train import weights

LABELS = ["forwards", "backwards"]
TOKENIZER = train_tokenizer(["Which way?"], TokenizerConfig(vocab_size=300))
SPEC = FeatureSpec(
    vocab_size=TOKENIZER.vocab_size, tokenizer_digest=TOKENIZER.digest, max_len=96,
    image=ImageSpec(size=16, patch=8, channels=1, resize="stretch"), audio=AudioSpec(n_mels=20, max_seconds=0.5),
    video=VideoSpec(fps=1.0, max_frames=2, sound=False), tasks=[TaskSpec(name="way", labels=LABELS)],
)  # fmt: skip
Files = list[tuple[str, bytes]]


def film(way: int, rng: np.random.Generator) -> Files:
    """A light that goes from left to right in two seconds, or back: all films show the same two pictures."""
    av = pytest.importorskip("av")
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream: Any = container.add_stream("mpeg4", rate=4)
        stream.width = stream.height = 64
        stream.pix_fmt, stream.bit_rate = "yuv420p", 4_000_000
        for n in range(8):
            pixels = rng.integers(0, 60, (64, 64, 3)).astype(np.uint8)
            pixels[:, 32 * (way ^ n // 4) :][:, :32] = 230
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = n
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return [("video", out.getvalue())]


def tones(way: int, rng: np.random.Generator) -> Files:
    """A low tone and a high one, each in a file of its own."""
    files = []
    for pitch in (300, 3000)[:: 1 - 2 * way]:
        out, t = io.BytesIO(), np.arange(int(rng.integers(4000, 7000))) / 16000
        noise = 0.02 * rng.standard_normal(len(t))
        soundfile.write(out, 0.4 * np.sin(2 * np.pi * pitch * t) + noise, 16000, format="WAV")
        files.append(("audio", out.getvalue()))
    return files


def encoded(files: Files, way: int) -> Sample:
    parts = [Part(kind, uri=str(n)) for n, (kind, _) in enumerate(files)]  # type: ignore[arg-type]
    record = Record("r", (*parts, Part("text", text="Which way?")), "way", Target(label=LABELS[way]))
    return Encoder(SPEC, TOKENIZER).encode(record, lambda part: files[int(part.uri or 0)][1])


def learnt(samples: list[Sample], config: ModelConfig) -> torch.nn.Module:
    torch.manual_seed(0)
    model = weights.build(config, SPEC)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for step in range(40):
        batch = collate([samples[(16 * step + n) % len(samples)] for n in range(16)], SPEC)
        optimizer.zero_grad()
        F.cross_entropy(model(batch).label_RC, batch.label_R).backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize(
    ("make", "slots", "changes"),
    [(film, [IMAGE] * 2, {}), (film, [IMAGE] * 2, {"image_places": "table"}), (tones, [AUDIO] * 2, {})],
    ids=["frames", "frames with a table of places", "sounds"],
)
def test_the_order_decides(
    make: Callable[[int, np.random.Generator], Files], slots: list[int], changes: dict[str, Any]
):
    rng = np.random.default_rng(0)
    samples = [encoded(make(n % 2, rng), n % 2) for n in range(64)]
    assert [t for t in samples[0].tokens.tolist() if t in (IMAGE, AUDIO)] == slots
    model = learnt(samples[:40], ModelConfig(width=32, layers=1, heads=2, **changes))
    batch = collate(samples[40:], SPEC)
    with torch.no_grad():
        assert (model(batch).label_RC.argmax(1) == batch.label_R).float().mean() > 0.95
        for one in samples[40:]:  # the same pictures, or sounds, the other way round
            one.images, one.sounds = one.images[::-1], one.sounds[::-1]
        assert (model(collate(samples[40:], SPEC)).label_RC.argmax(1) == batch.label_R).float().mean() < 0.05
