"""Retrieval: how often what belongs to a query is among the first of all candidates.

Axes: B resamples, Q query, G candidate, E embedding.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmlm.evals.scores import share
from mmlm.evals.statistics import Score

DEPTHS = (1, 5, 10)


def ranks(
    query_QE: np.ndarray, candidate_GE: np.ndarray, groups_Q: Sequence[str], groups_G: Sequence[str]
) -> np.ndarray:
    """(Q,) the place, from 1, of the first candidate of the query's own group, by cosine; the number of candidates and one
    where there is none. Of equal scores, half stand before it: rows that are all alike are no find. A score that is not finite,
    as of an embedding with NaN or infinity in it, finds nothing and stands behind all others."""
    unit_QE, unit_GE = (_of_length_1(x) for x in (query_QE, candidate_GE))
    score_QG = unit_QE @ unit_GE.T
    score_QG[~np.isfinite(score_QG)] = -np.inf
    own_QG = np.asarray(groups_Q)[:, None] == np.asarray(groups_G)
    best_Q = np.where(own_QG, score_QG, -np.inf).max(1)
    above = (score_QG > best_Q[:, None]).sum(1)
    level = ((score_QG == best_Q[:, None]) & ~own_QG).sum(1)
    return np.where(np.isfinite(best_Q), 1 + above + (level + 1) // 2, len(unit_GE) + 1)


def _of_length_1(x_NE: np.ndarray) -> np.ndarray:
    """Rows of length 1; NaN where one is not finite."""
    finite_N1 = np.isfinite(x_NE).all(1, keepdims=True)
    whole_NE = np.where(finite_N1, x_NE, np.nan)
    return whole_NE / np.maximum(np.linalg.norm(whole_NE, axis=1, keepdims=True), 1e-12)


def recalls(rank_Q: np.ndarray, depths: Sequence[int] = DEPTHS) -> dict[str, Score]:
    """`recall@K` for each depth, as functions of resample weights."""
    return {f"recall@{k}": share(rank_Q <= k) for k in depths}


def chance(groups_Q: Sequence[str], groups_G: Sequence[str], depth: int) -> float:
    """Recall of a ranking by lot: the mean over queries of 1 - C(G - m, k) / C(G, k), m being the candidates of its group."""
    G, found = len(groups_G), []
    for group in groups_Q:
        m = sum(g == group for g in groups_G)
        missed = np.prod([max(G - m - i, 0) / (G - i) for i in range(min(depth, G))])
        found.append(1 - missed)
    return float(np.mean(found))


class LinearCca:
    """Canonical correlation analysis (Hotelling 1936) between two tables of rows, each reduced to its first principal
    components: what a linear map finds in common between two modalities."""

    def __init__(self, components: int, size: int, ridge: float) -> None:
        self.components, self.size, self.ridge = components, size, ridge

    def fit(self, a_NF: np.ndarray, b_NF: np.ndarray) -> LinearCca:
        self._sides = [_Side(x, self.components, self.ridge) for x in (a_NF, b_NF)]
        a, b = (side.white(x) for side, x in zip(self._sides, (a_NF, b_NF), strict=True))
        u, strength, vt = np.linalg.svd(a.T @ b / len(a), full_matrices=False)
        self._maps = [u[:, : self.size] * strength[: self.size], vt[: self.size].T * strength[: self.size]]
        return self

    def transform(self, which: int, x_NF: np.ndarray) -> np.ndarray:
        """Rows of the first (0) or second (1) table in the common space, each direction as strong as it is correlated."""
        return self._sides[which].white(x_NF) @ self._maps[which]


class _Side:
    def __init__(self, x_NF: np.ndarray, components: int, ridge: float) -> None:
        self.mean, self.deviation = x_NF.mean(0), x_NF.std(0)
        self.deviation[self.deviation < 1e-8] = 1.0
        x = (x_NF - self.mean) / self.deviation
        _, strength, vt = np.linalg.svd(x, full_matrices=False)
        spread = strength[:components] / np.sqrt(len(x))
        self.map = vt[:components].T / np.sqrt(spread**2 + ridge)

    def white(self, x_NF: np.ndarray) -> np.ndarray:
        return ((x_NF - self.mean) / self.deviation) @ self.map
