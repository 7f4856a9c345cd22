"""Records that are alike: sets of them, and who of a set stays. The same for texts and for pictures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np

from mmlm.corpus.curation.buckets import Sets, pairs_in_buckets, rounds_across


class Index(Protocol):
    """Things that can be alike, numbered; `row` (int64) is the record of each."""

    row: np.ndarray

    def bands(self) -> Iterator[np.ndarray]:
        """(n,) uint64 each: things that may be alike have an equal key in at least one of the arrays."""

    def alike(self, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        """A mask: whether thing i[k] and thing j[k] are alike."""


def sets_of(index: Index, kind: np.ndarray) -> Sets:
    """The connected components of the pairs that are alike. `kind` (uint64): only things of one kind are compared."""
    sets = Sets(len(index.row))
    for band in index.bands():
        for i, j in pairs_in_buckets(_of_kind(band, kind), sets.together):
            todo = (sets.roots(i) != sets.roots(j)) & (kind[i] == kind[j])
            i, j = i[todo], j[todo]
            found = index.alike(i, j)
            for a, b in zip(i[found].tolist(), j[found].tolist(), strict=True):
                sets.join(a, b)
    return sets


def known_to(index: Index, kind: np.ndarray, train: np.ndarray, held: np.ndarray) -> dict[int, int]:
    """Thing of `train` → a thing of `held` of its kind that is like it. Both hold numbers of things, sorted."""
    owner = np.full(len(train), -1, dtype=np.int64)
    for band in index.bands():
        keys = _of_kind(band, kind)
        for partners in rounds_across(keys[train], keys[held]):
            a, b = partners(owner < 0)
            i, j = train[a], held[b]
            same = (kind[i] == kind[j]) & index.alike(i, j)
            owner[a[same]] = j[same]
    found = owner >= 0
    return dict(zip(train[found].tolist(), owner[found].tolist(), strict=True))


def _of_kind(band: np.ndarray, kind: np.ndarray) -> np.ndarray:
    """Keys that differ where the kinds do, so that what is never compared never meets."""
    return (band ^ (kind * np.uint64(0xC2B2AE3D27D4EB4F))) * np.uint64(0x9E3779B97F4A7C15)


def losers(sets: Sets, row: np.ndarray, split: np.ndarray, group: np.ndarray) -> dict[int, int]:
    """Record that goes → record that stays in its place.

    The owner of a set is its record of the highest `split` (2 test, 1 val, 0 train), and among these the first (rows
    are sorted by id). What shares the owner's group and split stays as well: several questions about one thing are no
    duplicates of each other.
    """
    roots = sets.roots(np.arange(len(row)))
    order = np.lexsort((row, -split[row].astype(np.int64), roots))
    sorted_roots = roots[order]
    first = np.flatnonzero(np.append(True, sorted_roots[1:] != sorted_roots[:-1])) if len(order) else order
    size = np.diff(np.append(first, len(order)))
    owner = np.repeat(row[order[first]], size)
    mine = row[order]
    goes = (group[mine] != group[owner]) | (split[mine] != split[owner])
    return dict(zip(mine[goes].tolist(), owner[goes].tolist(), strict=True))
