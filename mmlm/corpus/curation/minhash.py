"""MinHash signatures of texts (Broder 1997) and the pairs of texts that agree in a band of them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np

from mmlm.corpus.curation.buckets import pairs_in_buckets
from mmlm.corpus.curation.shingles import Shingles, shingles

EMPTY = np.uint32(0xFFFFFFFF)
"""What the signature of a text without words consists of."""
BLOCK = 1 << 15
"""Runs that are hashed at a time: 128 KiB, which stay in the cache."""
PIECE = 1 << 18
"""Characters of texts that are cut into runs at a time."""


def signatures(texts: list[str], *, ngram: int = 5, hashes: int = 112) -> np.ndarray:
    """(texts, hashes) uint32: for each of the hash functions its least value over a text's runs of `ngram` words."""
    return np.concatenate([minima(s, hashes) for s in in_pieces(texts, ngram)] or [np.empty((0, hashes), np.uint32)])


def in_pieces(texts: list[str], ngram: int) -> Iterator[Shingles]:
    """The runs of the texts, some texts at a time, so that memory does not grow with their number."""
    held: list[str] = []
    size = 0
    for text in texts:
        held.append(text)
        size += len(text)
        if size >= PIECE:
            yield shingles(held, ngram)
            held, size = [], 0
    if held:
        yield shingles(held, ngram)


def minima(runs: Shingles, hashes: int) -> np.ndarray:
    """(texts, hashes) uint32: the signatures of texts whose runs are given.

    Hash function i is x → a_i·x mod 2^32 with odd a_i, over the upper half of the hash of a run, which is random
    already (multiplicative hashing, Dietzfelbinger et al. 1997).
    """
    x = narrow(runs.hashes)
    filled = np.flatnonzero(np.diff(runs.starts))
    begins = runs.starts[filled]
    factors = _factors(hashes)
    found = np.full((hashes, len(filled)), EMPTY, dtype=np.uint32)
    buffer = np.empty(min(len(x), BLOCK), dtype=np.uint32)
    for low in range(0, len(x), BLOCK):
        block = x[low : low + BLOCK]
        # texts that have runs in this block; the first and the last may go on outside of it
        first = int(np.searchsorted(begins, low, "right")) - 1
        last = int(np.searchsorted(begins, low + len(block), "left"))
        at = np.maximum(begins[first:last] - low, 0)
        part = buffer[: len(block)]
        target = found[:, first:last]
        for i, factor in enumerate(factors):
            np.multiply(block, factor, out=part)
            np.minimum(target[i], np.minimum.reduceat(part, at), out=target[i])
    if len(filled) == len(runs.starts) - 1:
        return np.ascontiguousarray(found.T)
    result = np.full((len(runs.starts) - 1, hashes), EMPTY, dtype=np.uint32)
    result[filled] = found.T
    return result


def narrow(hashes: np.ndarray) -> np.ndarray:
    """The upper halves of 64-bit hashes, uint32."""
    return (hashes >> np.uint64(32)).astype(np.uint32)


def band_keys(signature: np.ndarray, band: int, rows: int) -> np.ndarray:
    """(texts,) uint64: equal where the `rows` hashes of a band are equal (or, once in 2^64, by chance)."""
    key = np.zeros(len(signature), dtype=np.uint64)
    for column in range(band * rows, (band + 1) * rows):
        key = (key ^ signature[:, column]) * np.uint64(0x9FB21C651E98DF25)
        key ^= key >> np.uint64(35)
    return key


def candidate_pairs(signature: np.ndarray, *, buckets: int = 14, rows: int = 8) -> np.ndarray:
    """(pairs, 2) int64, each pair once and sorted: texts with words that agree in at least one of the bands."""
    filled = np.flatnonzero((signature != EMPTY).any(axis=1))
    found = [np.empty((0, 2), dtype=np.int64)]
    for band in range(buckets):
        for i, j in pairs_in_buckets(band_keys(signature[filled], band, rows)):
            found.append(np.stack([filled[i], filled[j]], axis=1))
    return np.unique(np.concatenate(found), axis=0)


@cache
def _factors(count: int) -> list[np.uint32]:
    drawn = np.random.Generator(np.random.PCG64(1)).integers(0, 1 << 32, size=count, dtype=np.uint32)
    return [np.uint32(a) for a in drawn | np.uint32(1)]
