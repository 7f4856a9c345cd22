"""How many records of a source may stay, and which."""

from __future__ import annotations

import hashlib
import math

import numpy as np

from mmlm.corpus.curation.config import BalanceConfig
from mmlm.errors import DataError


def position(id: str, salt: str) -> int:
    """A 64-bit number that depends on the id alone; the lowest ones stay."""
    return int.from_bytes(hashlib.blake2b(f"{salt}\0{id}".encode(), digest_size=8).digest(), "big")


def caps(sizes: dict[str, int], config: BalanceConfig) -> dict[str, int]:
    """source → how many of its `sizes[source]` training records stay.

    The share holds for what is left: every source that would have more is cut to the same number, the largest for
    which it holds. Raises DataError when there are too few sources for the share.
    """
    limits = {s: min(n, config.sources.get(s, config.records or n)) for s, n in sizes.items() if n}
    if config.share is None or not limits:
        return limits
    if config.share * len(limits) < 1 - 1e-9:
        raise DataError(
            f"no source may have more than {config.share:g} of the training records, but there are {len(limits)}",
            wanted=f"a share of at least {1 / len(limits):.2f}",
            cure="raise scan.curate.balance.share, or add sources",
        )
    ordered = sorted(limits.values(), reverse=True)
    for cut in range(len(ordered)):
        # the `cut` largest are cut to c = share × (cut × c + what the others have)
        others, left = sum(ordered[cut:]), 1 - cut * config.share
        if left <= 1e-9:
            break
        most = math.floor(config.share * others / left + 1e-9)
        if ordered[cut] <= most or cut == len(ordered) - 1:
            return {s: min(n, most) for s, n in limits.items()} if cut else limits
    return {s: min(n, ordered[-1]) for s, n in limits.items()}


def surplus(positions: np.ndarray, rows: np.ndarray, keep: int) -> np.ndarray:
    """The rows that go when `keep` stay: those with the highest positions (a tie is broken by the row)."""
    return rows[np.lexsort((rows, positions))[keep:]]
