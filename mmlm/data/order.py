"""Which samples step N trains on: a pure function of (number of samples, seed, step), whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class Order:
    """A new pseudo-random permutation of `pool` every epoch; epochs follow each other without a gap."""

    def __init__(self, pool: Sequence[int], batch: int, seed: int) -> None:
        if not pool:
            raise ValueError("an order needs at least one sample")
        self.pool, self.batch, self.seed = np.asarray(pool, np.int64), batch, seed
        self._epoch, self._permutation = -1, self.pool

    def step(self, step: int) -> np.ndarray:
        """(batch,) sample numbers of optimizer step `step`, counted from 0."""
        at = np.arange(step * self.batch, (step + 1) * self.batch)
        epochs, places = at // len(self.pool), at % len(self.pool)
        return np.array([self._of_epoch(int(e))[p] for e, p in zip(epochs, places, strict=True)])

    def _of_epoch(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            rng = np.random.default_rng((self.seed, 1, epoch))
            self._epoch, self._permutation = epoch, self.pool[rng.permutation(len(self.pool))]
        return self._permutation


def share(batch: np.ndarray, rank: int, ranks: int) -> np.ndarray:
    """The part of a global batch that `rank` of `ranks` works on: contiguous, sizes differing by at most one."""
    return np.array_split(batch, ranks)[rank]
