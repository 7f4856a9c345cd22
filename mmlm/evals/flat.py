"""A sample as one flat row of numbers, for the logistic-regression baseline: the same stored features, no depth."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from mmlm.features.sample import Sample
from mmlm.features.spec import FeatureSpec

SIDE = 16
"""Pictures are reduced to at most this many pixels a side."""
GRADIENT_SIDE, CELLS, DIRECTIONS = 32, 4, 9
HASHED = 2**12
"""Columns that character n-grams of texts are hashed into."""

Decode = Callable[[list[int]], str]


def flat_rows(samples: Sequence[Sample], kept: frozenset[str], spec: FeatureSpec, decode: Decode) -> np.ndarray:
    """(N, columns) float32 of what `kept` names. A missing modality is zeros and a 0 in its own column.

    Texts are in it when `kept` has `context` or nothing at all (then the question is all there is).
    """
    parts: list[np.ndarray] = []
    if "image" in kept and spec.image is not None:
        channels = spec.image.channels
        width = SIDE * SIDE + CELLS * CELLS * (DIRECTIONS + (3 if channels == 3 else 0))
        parts.append(_stack([_picture(s.images[0], channels) if s.images else None for s in samples], width))
    if "audio" in kept and spec.audio is not None:
        width = 3 * spec.audio.n_mels + 1
        parts.append(_stack([_sound(s.sounds[0]) if s.sounds else None for s in samples], width))
    if "fields" in kept and spec.fields is not None:
        width = 2 * len(spec.fields.numbers) + sum(map(len, spec.fields.categories.values()))
        parts.append(_stack([_fields(s, spec) if s.fields else None for s in samples], width))
    rows = np.concatenate(parts, axis=1) if parts else np.zeros((len(samples), 0), dtype=np.float32)
    if "context" in kept or not kept:
        hashed = _texts([_text(s, decode, question=not kept) for s in samples])
        rows = np.concatenate([rows, hashed], axis=1)
    return rows


def _stack(found: list[np.ndarray | None], width: int) -> np.ndarray:
    """Rows with a column in front that says whether the modality is there; as wide when none of these rows has it."""
    table = np.zeros((len(found), width + 1), dtype=np.float32)
    for i, row in enumerate(found):
        if row is not None:
            table[i, 0], table[i, 1:] = 1, row
    return table


def _picture(picture: np.ndarray, channels: int) -> np.ndarray:
    """Grey pixels (16 x 16), a histogram of gradient directions per cell (after Dalal & Triggs 2005), colour means."""
    grey = Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture).convert("L")
    small = np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float32).ravel() / 255
    middle = np.asarray(grey.resize((GRADIENT_SIDE, GRADIENT_SIDE), Image.Resampling.BOX), dtype=np.float32) / 255
    parts = [small, _gradients(middle)]
    if channels == 3 and picture.shape[-1] == 3:
        colours = Image.fromarray(picture).resize((CELLS, CELLS), Image.Resampling.BOX)
        parts.append(np.asarray(colours, dtype=np.float32).ravel() / 255)
    return np.concatenate(parts)


@functools.cache
def _cells() -> np.ndarray:
    """(pixels,) number of the cell that each pixel lies in."""
    at = np.arange(GRADIENT_SIDE) * CELLS // GRADIENT_SIDE
    return (at[:, None] * CELLS + at[None, :]).ravel()


def _gradients(grey: np.ndarray) -> np.ndarray:
    dy, dx = np.gradient(grey)
    strength = np.hypot(dx, dy).ravel()
    direction = np.minimum((np.mod(np.arctan2(dy, dx), np.pi) / np.pi * DIRECTIONS).astype(int), DIRECTIONS - 1).ravel()
    counts = np.bincount(_cells() * DIRECTIONS + direction, strength, CELLS * CELLS * DIRECTIONS)
    counts = counts.reshape(CELLS * CELLS, DIRECTIONS)
    return (counts / (np.linalg.norm(counts, axis=1, keepdims=True) + 0.1)).astype(np.float32).ravel()


def _sound(mel: np.ndarray) -> np.ndarray:
    """Mean, standard deviation and maximum of each mel bin over time, and the length (log frames)."""
    mel = mel.astype(np.float32)
    return np.concatenate([mel.mean(0), mel.std(0), mel.max(0), np.log1p([np.float32(len(mel))])])


def _fields(sample: Sample, spec: FeatureSpec) -> np.ndarray:
    """Numbers standardised as the model sees them, then categories as one column a value; absent is 0."""
    assert spec.fields is not None
    row: list[float] = []
    for name, (mean, deviation) in sorted(spec.fields.numbers.items()):
        value = sample.fields.get(name)
        there = isinstance(value, int | float) and bool(np.isfinite(value))
        row += [(float(value) - mean) / (deviation or 1.0) if there and value is not None else 0.0, float(there)]
    for name, values in sorted(spec.fields.categories.items()):
        row += [float(sample.fields.get(name) == v) for v in values]
    return np.array(row, dtype=np.float32)


def _text(sample: Sample, decode: Decode, question: bool) -> str:
    tokens = sample.tokens[: sample.answer_at]
    if question:
        return decode([int(t) for t in tokens])
    return " ".join(decode([int(t) for t in tokens[first:last]]) for first, last in sample.context_spans)


def _texts(found: list[str]) -> np.ndarray:
    from sklearn.feature_extraction.text import HashingVectorizer

    hashing = HashingVectorizer(analyzer="char_wb", ngram_range=(1, 4), n_features=HASHED, dtype=np.float32)
    return np.asarray(hashing.transform(found).todense())
