"""Small real inputs that several tests share: a feature spec and random samples that fit it."""

from __future__ import annotations

import numpy as np

from mmlm.features.sample import Sample
from mmlm.features.spec import (
    ANSWER,
    AUDIO,
    BOS,
    CONTEXT,
    EOS,
    FIELDS,
    IMAGE,
    AudioSpec,
    FeatureSpec,
    FieldsSpec,
    ImageSpec,
    TaskSpec,
)

SPEC = FeatureSpec(
    vocab_size=64,
    tokenizer_digest="none",
    max_len=96,
    image=ImageSpec(size=16, patch=8, channels=1),
    audio=AudioSpec(max_seconds=0.5, n_mels=8, frames_per_token=4),
    fields=FieldsSpec(numbers={"age": (50.0, 10.0)}, categories={"sex": ["f", "m"]}),
    tasks=[TaskSpec(name="kind", labels=["a", "b", "c"], has_text=True), TaskSpec(name="free", has_text=True)],
)


def sample(seed: int, given: tuple[str, ...] = ("image", "audio", "fields", "context"), task: str = "kind") -> Sample:
    """A random sample that gives the named modalities."""
    rng = np.random.default_rng(seed)
    tokens: list[int] = [BOS]
    spans: list[tuple[int, int]] = []
    for name, slot in (("image", IMAGE), ("audio", AUDIO), ("fields", FIELDS)):
        if name in given:
            tokens.append(slot)
    if "context" in given:
        words = rng.integers(9, 64, 3).tolist()
        spans.append((len(tokens), len(tokens) + 4))
        tokens += [CONTEXT, *words]
    tokens += rng.integers(9, 64, int(rng.integers(2, 6))).tolist()
    at = len(tokens)
    tokens += [ANSWER, *rng.integers(9, 64, int(rng.integers(1, 4))).tolist(), EOS]
    frames = int(rng.integers(5, 40))
    return Sample(
        id=f"s{seed}",
        task=task,
        tokens=np.array(tokens, np.int32),
        answer_at=at,
        images=[rng.integers(0, 256, (16, 16, 1)).astype(np.uint8)] if "image" in given else [],
        sounds=[rng.uniform(-6, 0, (frames, 8)).astype(np.float16)] if "audio" in given else [],
        fields={"age": float(rng.normal(50, 10)), "sex": "fm"[seed % 2]} if "fields" in given else {},
        context_spans=spans,
        label="abc"[seed % 3] if task == "kind" else None,
        split="train",
        group=f"g{seed}",
    )
