"""A sample as one flat row of numbers, for the logistic-regression baseline: the same stored features, no depth.

Pictures are told as what such classifiers were given before networks learnt it: histograms of the orientations of edges and of
colours, by the functions that `image_stem: hog` reads them with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image

from mmlm.features.sample import Sample
from mmlm.features.spec import FeatureSpec, ImageSpec
from mmlm.model.hog import CELL, LEVELS, ORIENTATIONS, colours, edges

SIDE = 64
"""Pictures are reduced to at most this many pixels a side, so that a row has at most 1,856 columns."""
PIXELS = 16
"""Rows and columns of grey pixels."""
AREAS = 4
"""Rows and columns of areas whose colours are counted, and of cells whose edges are, at least."""
BLOCK = 8
"""Pictures at a time: so few stay in the processor's cache, which halves the time."""
HASHED = 2**12
"""Columns that character n-grams of texts are hashed into."""

Decode = Callable[[list[int]], str]


def flat_rows(samples: Sequence[Sample], kept: frozenset[str], spec: FeatureSpec, decode: Decode) -> np.ndarray:
    """(N, columns) float32 of what `kept` names. A missing modality is zeros and a 0 in its own column.

    Texts are in it when `kept` has `context` or nothing at all (then the question is all there is).
    """
    parts: list[np.ndarray] = []
    if "image" in kept and spec.image is not None:
        parts.append(_picture_rows(samples, spec.image))
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


def _picture_rows(samples: Sequence[Sample], spec: ImageSpec) -> np.ndarray:
    """Of the first picture of each."""
    cells = max(AREAS, min(spec.size, SIDE) // CELL)
    side = cells * max(1, min(CELL, spec.size // cells))
    width = PIXELS**2 + cells**2 * ORIENTATIONS + (AREAS**2 * len(LEVELS) ** 3 if spec.channels == 3 else 0)
    found: list[np.ndarray | None] = [None] * len(samples)
    given = [i for i, s in enumerate(samples) if s.images]
    for at in range(0, len(given), BLOCK):
        block = given[at : at + BLOCK]
        for i, row in zip(block, _pictures([samples[i].images[0] for i in block], cells, side), strict=True):
            found[i] = row
    return _stack(found, width)


@torch.no_grad()
def _pictures(pictures: list[np.ndarray], cells: int, side: int) -> np.ndarray:
    """(I, columns): grey pixels, what edges there are in each cell, and which colours in each area where there are any.

    Colours are counted as they are, not as they differ from the picture's mean: so a logistic regression learns more of the
    stamps (.604 of their training part in five folds, against .582, with the whole picture as one area).
    """
    drawn = [Image.fromarray(x[..., 0] if x.shape[-1] == 1 else x) for x in pictures]
    grey = [np.asarray(x.convert("L").resize((PIXELS, PIXELS), Image.Resampling.BOX)).ravel() for x in drawn]
    parts = [torch.from_numpy(np.stack(grey)) / 255]
    resized = np.stack([np.asarray(x.resize((side, side), Image.Resampling.BOX)) for x in drawn])
    x_IHWC = torch.from_numpy(resized.reshape(len(drawn), side, side, -1)) / 255
    deviation, mean = torch.std_mean(x_IHWC, (1, 2, 3), correction=0, keepdim=True)
    parts.append(edges((x_IHWC - mean) / (deviation + 1e-3), side // cells).flatten(1))
    if x_IHWC.shape[-1] == 3:
        spread = LEVELS[0] + x_IHWC * (LEVELS[-1] - LEVELS[0])
        parts.append(colours(spread, side // AREAS).sqrt().flatten(1))
    return np.asarray(torch.cat(parts, 1))


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
