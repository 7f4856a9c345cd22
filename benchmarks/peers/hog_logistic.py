"""Histograms of oriented gradients and of colours, and a logistic regression: how few pictures are classified without training a
network (Dalal & Triggs 2005: cells of 8 pixels, 9 orientations, blocks of 2 x 2 cells, L2-Hys; 4 levels a channel).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

CELL, ORIENTATIONS, CLIP, LEVELS = 8, 9, 0.2, 4
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)


def hog(x_HWC: np.ndarray) -> np.ndarray:
    """(blocks * 36,) float32. The channel with the longest gradient votes, for the two orientations nearest."""
    g = x_HWC.astype(np.float32) / 255
    down, right = np.zeros_like(g), np.zeros_like(g)
    down[1:-1], right[:, 1:-1] = g[2:] - g[:-2], g[:, 2:] - g[:, :-2]
    length = np.hypot(down, right)
    strongest = length.argmax(-1)[..., None]
    dy, dx, length = (np.take_along_axis(a, strongest, -1)[..., 0] for a in (down, right, length))
    at = np.arctan2(dy, dx) % np.pi / np.pi * ORIENTATIONS
    low, share = np.floor(at).astype(int) % ORIENTATIONS, at - np.floor(at)
    n = len(g) // CELL
    votes = np.zeros((n, n, ORIENTATIONS), np.float32)
    row, column = np.indices(length.shape) // CELL
    np.add.at(votes, (row, column, low), length * (1 - share))
    np.add.at(votes, (row, column, (low + 1) % ORIENTATIONS), length * share)
    blocks = np.concatenate([votes[:-1, :-1], votes[1:, :-1], votes[:-1, 1:], votes[1:, 1:]], -1)
    return _normal(np.minimum(_normal(blocks), CLIP)).ravel()


def _normal(blocks: np.ndarray) -> np.ndarray:
    return blocks / np.sqrt((blocks**2).sum(-1, keepdims=True) + 1e-3)


def colours(x_HWC: np.ndarray) -> np.ndarray:
    """(LEVELS ** channels,) roots of the shares of the pixels."""
    level = x_HWC.astype(int) * LEVELS // 256
    number = np.zeros(level.shape[:2], int)
    for c in range(level.shape[-1]):
        number = number * LEVELS + level[..., c]
    return np.sqrt(np.bincount(number.ravel(), minlength=LEVELS ** level.shape[-1]) / number.size)


def fit_and_say(
    train: Sequence[np.ndarray], labels: Sequence[str], inner: np.ndarray, asked: Sequence[np.ndarray]
) -> list[str]:
    """Labels of `asked`, pictures as (H, W, C) uint8. Of STRENGTHS the one is taken that does best on the training pictures that
    `inner` marks, fitted on the others; then all are fitted."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rows, wanted = (np.stack([np.concatenate([hog(x), colours(x)]) for x in xs]) for xs in (train, asked))
    y = np.array(labels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        models = {s: make_pipeline(StandardScaler(), LogisticRegression(C=s, max_iter=500)) for s in STRENGTHS}
        best = max(STRENGTHS, key=lambda s: models[s].fit(rows[~inner], y[~inner]).score(rows[inner], y[inner]))
        return [str(label) for label in models[best].fit(rows, y).predict(wanted)]
