"""Scores of answers that are numbers, each as a function of resample weights (see `statistics`).

Axes: B resamples, N records.
"""

from __future__ import annotations

import numpy as np

from mmlm.evals.statistics import Score


def number_scores(truth_N: np.ndarray, said_N: np.ndarray) -> dict[str, Score]:
    """r2 (share of the variance of these records that is explained; below 0 where their mean would be a better answer),
    mae and rmse in the number's own unit."""
    error_N = (said_N - truth_N).astype(np.float64)
    centred_N = (truth_N - truth_N.mean()).astype(
        np.float64
    )  # before squares are taken: a large mean would eat the digits

    def mean(x_N: np.ndarray, w: np.ndarray) -> np.ndarray:
        return (w @ x_N) / w.sum(1)

    def r2(w: np.ndarray) -> np.ndarray:
        variance = mean(centred_N**2, w) - mean(centred_N, w) ** 2
        unexplained = mean(error_N**2, w)
        return 1 - np.divide(unexplained, variance, out=np.full(len(w), np.nan), where=variance > 0)

    return {
        "r2": r2,
        "mae": lambda w: mean(np.abs(error_N), w),
        "rmse": lambda w: np.sqrt(mean(error_N**2, w)),
    }
