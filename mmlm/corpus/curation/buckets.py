"""Who shares a bucket: pairs with equal keys, and the sets that pairs join (union-find)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

Pairs = tuple[np.ndarray, np.ndarray]
CHUNK = 1 << 19
"""Pairs that are handed out at a time."""
CROWD = 5_000
"""In a bucket of more, each is compared with the first and the NEIGHBOURS that follow it only, so that wording which
very many records share cannot make the work quadratic."""
NEIGHBOURS = 500


def pairs_in_buckets(keys: np.ndarray, settled: Callable[[np.ndarray], bool] | None = None) -> Iterator[Pairs]:
    """Pairs i < j with `keys[i] == keys[j]`, each once, some at a time.

    First every bucket's first with each of the others; then, where `settled(members)` does not say that this was
    enough, the rest.
    """
    order = np.argsort(keys, kind="stable")
    sorted_keys = keys[order]
    edges = np.flatnonzero(sorted_keys[1:] != sorted_keys[:-1]) + 1
    begins = np.concatenate([[0], edges]).astype(np.int64)
    ends = np.append(edges, len(keys)).astype(np.int64)
    several = ends - begins > 1
    begins, ends = begins[several], ends[several]
    sizes = ends - begins
    for part in _chunks(sizes - 1):
        size = sizes[part] - 1
        first = np.repeat(order[begins[part]], size)
        ramp = np.arange(size.sum()) - np.repeat(np.cumsum(size) - size, size)
        yield first, order[np.repeat(begins[part] + 1, size) + ramp]
    for begin, end in zip(begins[sizes > 2].tolist(), ends[sizes > 2].tolist(), strict=True):
        members = order[begin:end]
        if settled is None or not settled(members):
            yield from _all_but_first(members)


def rounds_across(left: np.ndarray, right: np.ndarray) -> Iterator[Callable[[np.ndarray], Pairs]]:
    """Pairs (i, j) with `left[i] == right[j]`: each round takes a mask of the lefts that still search and gives them
    their next partner, in order of j. At most the first CROWD partners of each."""
    order = np.argsort(right, kind="stable")
    sorted_right = right[order]
    low = np.searchsorted(sorted_right, left, "left")
    size = np.minimum(np.searchsorted(sorted_right, left, "right") - low, CROWD)

    def round_of(number: int) -> Callable[[np.ndarray], Pairs]:
        def pairs(searching: np.ndarray) -> Pairs:
            i = np.flatnonzero(searching & (size > number))
            return i, order[low[i] + number]

        return pairs

    for number in range(int(size.max(initial=0))):
        yield round_of(number)


def _all_but_first(members: np.ndarray) -> Iterator[Pairs]:
    """All pairs of sorted `members` without those of the first."""
    rest = members[1:]
    reach = NEIGHBOURS if len(members) > CROWD else len(rest)
    partners = np.minimum(len(rest) - 1 - np.arange(len(rest)), reach)
    for part in _chunks(partners):
        size = partners[part]
        at = np.repeat(np.arange(part.start, part.stop), size)
        ramp = np.arange(size.sum()) - np.repeat(np.cumsum(size) - size, size)
        yield rest[at], rest[at + 1 + ramp]


def _chunks(sizes: np.ndarray) -> Iterator[slice]:
    """Slices of `sizes` whose sums are about CHUNK."""
    if not len(sizes):
        return
    number = (np.cumsum(sizes) - sizes) // CHUNK
    cuts = np.concatenate([[0], np.flatnonzero(np.diff(number)) + 1, [len(sizes)]])
    for low, high in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
        yield slice(low, high)


class Sets:
    """Disjoint sets of 0 … count-1; the root of a set is its smallest member, so order does not matter."""

    def __init__(self, count: int) -> None:
        self.parent = np.arange(count, dtype=np.int64)

    def root(self, i: int) -> int:
        parent = self.parent
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = int(parent[i])
        return i

    def roots(self, members: np.ndarray) -> np.ndarray:
        """The roots of several at once."""
        found = self.parent[members]
        while True:
            above = self.parent[found]
            if np.array_equal(above, found):
                self.parent[members] = found
                return found
            found = above

    def join(self, i: int, j: int) -> None:
        low, high = sorted((self.root(i), self.root(j)))
        self.parent[high] = low

    def together(self, members: np.ndarray) -> bool:
        """Whether all of them are in one set."""
        found = self.roots(members)
        return bool((found == found[0]).all())
