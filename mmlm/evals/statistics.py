"""How sure a score is: bootstrap intervals, the paired comparison of two models, exact tests. numpy only.

A resample is a row of weights W (resamples, records): how often each record was drawn. A score is a function of W, so
one formula gives both the value (all weights 1) and its interval, and a thousand resamples are a few matrix products.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

Score = Callable[[np.ndarray], np.ndarray]
"""Weights (resamples, records) → value per resample; NaN where the score is undefined."""

MAX_WEIGHTS = 16_000_000
"""Weights held at once; larger test sets are resampled in pieces."""


@dataclass(frozen=True)
class Interval:
    value: float
    low: float
    high: float


class Resamples:
    """`samples` draws of `n` records with replacement; of whole groups where records share one.

    Renderings of one thing are not independent: drawn one by one they would make the interval too narrow.
    """

    def __init__(self, n: int, groups: Sequence[str] | None, samples: int, seed: int) -> None:
        self.n, self.samples, self.seed = n, samples, seed
        self.members: np.ndarray | None = None
        self.units = n
        if groups is not None:
            if len(groups) != n:
                raise ValueError(f"{len(groups)} groups for {n} records")
            names, members = np.unique(np.asarray([g or f"\0{i}" for i, g in enumerate(groups)]), return_inverse=True)
            if len(names) < n:
                self.units, self.members = len(names), members
        self._kept: list[np.ndarray] | None = None

    def weights(self) -> Iterator[np.ndarray]:
        """Pieces of W (at most `samples` rows in all, records) float32; the same ones at every call."""
        if self._kept is not None:
            yield from self._kept
            return
        rows = max(1, min(self.samples, MAX_WEIGHTS // max(self.n, 1)))
        pieces = self._draw(rows)
        if rows == self.samples:
            self._kept = list(pieces)
            pieces = iter(self._kept)
        yield from pieces

    def _draw(self, rows: int) -> Iterator[np.ndarray]:
        generator = np.random.default_rng(self.seed)
        for start in range(0, self.samples, rows):
            count = min(rows, self.samples - start)
            drawn = generator.integers(0, self.units, size=(count, self.units))
            drawn += self.units * np.arange(count)[:, None]
            w = np.bincount(drawn.ravel(), minlength=count * self.units).reshape(count, self.units).astype(np.float32)
            yield w if self.members is None else w[:, self.members]


def interval(score: Score, resamples: Resamples, confidence: float, *, share: bool = False) -> Interval:
    """The score of all records with its percentile bootstrap interval (Efron 1979); `value` lies inside by definition.

    `share` marks a share of right answers: where all records agree the bootstrap has no width, so the bound of
    Wilson (1927) for the number of independent units stands in its place. NaN everywhere when the score is undefined.
    """
    value = float(score(np.ones((1, resamples.n), dtype=np.float32))[0])
    if not math.isfinite(value):
        return Interval(math.nan, math.nan, math.nan)
    values = np.concatenate([score(w) for w in resamples.weights()])
    values = values[np.isfinite(values)]
    if not len(values):
        return Interval(value, value, value)
    tail = (1 - confidence) / 2
    low, high = (float(x) for x in np.quantile(values, [tail, 1 - tail]))
    if share and value in (0.0, 1.0):
        low, high = wilson(round(value * resamples.units), resamples.units, confidence)
    return Interval(value, min(low, value), max(high, value))


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of a binomial share (Wilson 1927)."""
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / n
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact p-value (McNemar 1947, binomial form) from the records that just one of two models got right."""
    n, k = only_first + only_second, min(only_first, only_second)
    if n == 0:
        return 1.0
    below = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2) for i in range(k + 1)]
    return min(1.0, 2 * math.fsum(math.exp(x) for x in below))


def compare(
    champion_correct: Sequence[float] | np.ndarray,
    challenger_correct: Sequence[float] | np.ndarray,
    groups: Sequence[str] | None = None,
    *,
    samples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, float]:
    """Paired comparison of two models on the same records, in the same order.

    `difference` is challenger minus champion with the paired bootstrap interval `low` to `high` (whole groups are
    drawn where records share one); `probability_better` is the share of resamples in which the challenger leads, ties
    counted half; `p_value` is McNemar's over single records, so with groups it is the more optimistic of the two.
    """
    champion = np.asarray(champion_correct, dtype=np.float64)
    challenger = np.asarray(challenger_correct, dtype=np.float64)
    if champion.shape != challenger.shape or champion.ndim != 1 or not len(champion):
        raise ValueError(f"two equally long, non-empty rows wanted, not {champion.shape} and {challenger.shape}")
    change = (challenger - champion).astype(np.float32)

    def difference(w: np.ndarray) -> np.ndarray:
        return (w @ change) / w.sum(1)

    resamples = Resamples(len(change), groups, samples, seed)
    found = interval(difference, resamples, confidence)
    values = np.concatenate([difference(w) for w in resamples.weights()])
    return {
        "difference": found.value,
        "low": found.low,
        "high": found.high,
        "probability_better": float(np.mean(values > 0) + 0.5 * np.mean(values == 0)),
        "p_value": mcnemar(int(np.sum(change < 0)), int(np.sum(change > 0))),
    }
