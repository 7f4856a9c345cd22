"""Scores of answers that are sets of classes, each as a function of resample weights (see `statistics`).

Axes: B resamples, N records, K classes.
"""

from __future__ import annotations

import numpy as np

from mmlm.evals.scores import Ranking, ratio_of, roc_auc_of, share
from mmlm.evals.statistics import Score

MOST_LABELS = 30
"""Labels up to which each has a row of its own for its ROC-AUC."""


def set_scores(
    truth_NK: np.ndarray, given_NK: np.ndarray, scores_NK: np.ndarray, labels: list[str]
) -> dict[str, Score]:
    """precision, recall and f1, each `_macro` (over the classes that occur) and `_micro` (pooled); subset_accuracy (the
    whole set is right); roc_auc, the mean over classes, and with few classes `roc_auc/<label>` of each.

    `truth_NK` and `given_NK` are bool; `scores_NK` has no rows when the model gives no scores.
    """
    hits, said, true = (x.astype(np.float32) for x in (truth_NK & given_NK, given_NK, truth_NK))

    def macro(ratio: str) -> Score:
        def score(w: np.ndarray) -> np.ndarray:
            counts = [w @ x for x in (hits, said, true)]
            occurs = (counts[1] + counts[2]) > 0
            return (ratio_of(ratio, *counts) * occurs).sum(1) / np.maximum(occurs.sum(1), 1)

        return score

    def micro(ratio: str) -> Score:
        pooled = [x.sum(1) for x in (hits, said, true)]
        return lambda w: ratio_of(ratio, *(w @ x for x in pooled))

    scores: dict[str, Score] = {"subset_accuracy": share((truth_NK == given_NK).all(1))}
    for ratio in ("f1", "precision", "recall"):
        scores[f"{ratio}_micro"] = micro(ratio)
        scores[f"{ratio}_macro"] = macro(ratio)
    if len(scores_NK):
        ranked = {label: Ranking(truth_NK[:, k], scores_NK[:, k]) for k, label in enumerate(labels)}
        ranked = {label: one for label, one in ranked.items() if one.usable}
        scores["roc_auc"] = roc_auc_of(list(ranked.values()))
        if len(labels) <= MOST_LABELS:
            scores |= {f"roc_auc/{label}": roc_auc_of([one]) for label, one in ranked.items()}
    return scores
