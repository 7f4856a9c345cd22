"""Scores of class answers, each as a function of resample weights (see `statistics`).

Axes: B resamples, N records, K classes. Averages follow scikit-learn: `macro` is the mean over the classes that occur
among the true or given answers, with 0 for a ratio of nothing; `micro` pools all records, so for one class a record
it equals accuracy.
"""

from __future__ import annotations

import numpy as np

from mmlm.evals.statistics import Score

BINS = 15
"""Equal-width bins of confidence in the calibration error."""
SHARES = ("accuracy", "exact_match", "subset_accuracy")
"""Scores that are shares of right answers."""


def one_hot(index_N: np.ndarray, classes: int) -> np.ndarray:
    """(N, K) float32; a negative index is a row of zeros."""
    table_NK = np.zeros((len(index_N), classes), dtype=np.float32)
    known = np.flatnonzero(index_N >= 0)
    table_NK[known, index_N[known]] = 1
    return table_NK


def share(right_N: np.ndarray) -> Score:
    """Weighted mean of right (1) and wrong (0): accuracy, exact match."""
    right = right_N.astype(np.float32)
    return lambda w: (w @ right) / w.sum(1)


def class_scores(truth_N: np.ndarray, given_N: np.ndarray, classes: int) -> dict[str, Score]:
    """accuracy; precision, recall and f1, each `_macro` and `_micro`. A given answer of -1 is no class at all."""
    true_NK, given_NK = one_hot(truth_N, classes), one_hot(given_N, classes)
    table_N3K = np.concatenate([true_NK * given_NK, given_NK, true_NK], axis=1)

    last: list[tuple[np.ndarray, tuple[np.ndarray, np.ndarray, np.ndarray]]] = []

    def counts(w: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Hits, given and true answers per resample and class; the last ones are kept, six scores ask for them."""
        if not last or last[0][0] is not w:
            hit, given, true = np.split(w @ table_N3K, 3, axis=1)
            last[:] = [(w, (hit, given, true))]
        return last[0][1]

    def macro(ratio: str) -> Score:
        def score(w: np.ndarray) -> np.ndarray:
            hit, given, true = counts(w)
            occurs = (given + true) > 0
            return (ratio_of(ratio, hit, given, true) * occurs).sum(1) / np.maximum(occurs.sum(1), 1)

        return score

    def micro(ratio: str) -> Score:
        return lambda w: ratio_of(ratio, *(c.sum(1) for c in counts(w)))

    scores: dict[str, Score] = {"accuracy": share(truth_N == given_N)}
    for ratio in ("precision", "recall", "f1"):
        scores[f"{ratio}_macro"] = macro(ratio)
        scores[f"{ratio}_micro"] = micro(ratio)
    return scores


def ratio_of(name: str, hit: np.ndarray, given: np.ndarray, true: np.ndarray) -> np.ndarray:
    whole = {"precision": given, "recall": true, "f1": (given + true) / 2}[name]
    return np.divide(hit, whole, out=np.zeros_like(hit), where=whole > 0)


def roc_auc(truth_N: np.ndarray, scores_NK: np.ndarray) -> Score:
    """Area under the ROC curve: of the second class when there are two, else the mean of one class against the rest.

    Rank form with ties counted half (Mann & Whitney 1947). Classes without a positive or a negative record are left
    out of the mean, so a resample in which a class is missing still has a value.
    """
    classes = [1] if scores_NK.shape[1] == 2 else list(range(scores_NK.shape[1]))
    ranked = [Ranking(truth_N == k, scores_NK[:, k]) for k in classes]
    return roc_auc_of([r for r in ranked if r.usable])


def roc_auc_of(ranked: list[Ranking]) -> Score:
    """The mean of the areas of `ranked`."""

    def score(w: np.ndarray) -> np.ndarray:
        if not ranked:
            return np.full(len(w), np.nan)
        areas = np.stack([r.area(w) for r in ranked])
        there = np.isfinite(areas)
        total = np.where(there, areas, 0).sum(0)
        return np.divide(total, there.sum(0), out=np.full(len(w), np.nan), where=there.any(0))

    return score


class Ranking:
    """Records of one class against the rest, sorted by score once for all resamples."""

    def __init__(self, positive_N: np.ndarray, score_N: np.ndarray) -> None:
        self.usable = bool(positive_N.any() and not positive_N.all())
        order = np.argsort(score_N, kind="stable")
        self.positive = np.flatnonzero(positive_N)
        self.negatives = order[~positive_N[order]]
        ascending = score_N[self.negatives]
        self.below = np.searchsorted(ascending, score_N[self.positive], "left")
        self.not_above = np.searchsorted(ascending, score_N[self.positive], "right")

    def area(self, w: np.ndarray) -> np.ndarray:
        seen = np.zeros((len(w), len(self.negatives) + 1), dtype=np.float32)
        np.cumsum(w[:, self.negatives], axis=1, out=seen[:, 1:])
        beaten = (seen[:, self.below] + seen[:, self.not_above]) / 2
        w_positive = w[:, self.positive]
        pairs = w_positive.sum(1) * seen[:, -1]
        won = (w_positive * beaten).sum(1, dtype=np.float64)
        return np.divide(won, pairs, out=np.full(len(w), np.nan), where=pairs > 0)


def calibration_error(confidence_N: np.ndarray, right_N: np.ndarray) -> Score:
    """Expected calibration error: |confidence - share right| per bin of confidence, weighted by its records."""
    bins = np.minimum((confidence_N * BINS).astype(int), BINS - 1)
    gap_NB = one_hot(bins, BINS) * (confidence_N - right_N).astype(np.float32)[:, None]
    return lambda w: np.abs(w @ gap_NB).sum(1) / w.sum(1)


def roc_curve(positive_N: np.ndarray, score_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rates from the highest threshold to the lowest, one point per distinct score."""
    order = np.argsort(-score_N, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(score_N[order])), len(order) - 1)
    true, false = np.cumsum(positive_N[order])[ends], np.cumsum(~positive_N[order])[ends]
    start = np.zeros(1)
    return (
        np.concatenate([start, false / max(int((~positive_N).sum()), 1)]),
        np.concatenate([start, true / max(int(positive_N.sum()), 1)]),
    )


def confusion(truth_N: np.ndarray, given_N: np.ndarray, classes: int) -> np.ndarray:
    """(K, K) counts: rows are the true class, columns the given one; answers outside the classes are not in it."""
    inside = (truth_N >= 0) & (given_N >= 0)
    flat = truth_N[inside] * classes + given_N[inside]
    return np.bincount(flat, minlength=classes * classes).reshape(classes, classes)
