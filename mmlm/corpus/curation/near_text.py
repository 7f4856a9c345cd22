"""Which texts are nearly the same: MinHash signatures choose the pairs, the shingle sets themselves decide."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from mmlm.corpus.curation.columns import GrowingArray, in_order
from mmlm.corpus.curation.config import NearTextConfig
from mmlm.corpus.curation.minhash import PIECE, band_keys, minima, narrow
from mmlm.corpus.curation.shingles import shingles


class TextIndex:
    """Signatures and shingles of texts, on disk: 4 bytes for each hash of a signature and for each word."""

    def __init__(self, config: NearTextConfig, row: np.ndarray, signature: np.ndarray, runs: np.ndarray) -> None:
        self.config, self.row, self.signature = config, row, signature
        self.runs, self.starts = runs, np.empty(0, dtype=np.int64)
        self._set = lru_cache(4096)(self._read)

    @classmethod
    def build(
        cls, texts: Iterator[tuple[int, str]], config: NearTextConfig, folder: Path, workers: int = 1
    ) -> TextIndex:
        """Of (number of the record, its text); those without words are left out."""
        hashes = config.buckets * config.rows
        row = GrowingArray(folder / "row", np.int64)
        signature = GrowingArray(folder / "signature", np.uint32, hashes)
        runs = GrowingArray(folder / "runs", np.uint32)
        count = GrowingArray(folder / "count", np.int64)
        sign = partial(_sign, ngram=config.ngram, hashes=hashes)
        for numbers, signed, narrowed, counts in in_order(sign, pieces(texts), workers):
            filled = counts > 0
            row.append(numbers[filled])
            signature.append(signed[filled])
            runs.append(narrowed)
            count.append(counts[filled])
        index = cls(config, row.read(), signature.read().reshape(-1, hashes), runs.read())
        index.starts = np.concatenate([[0], np.cumsum(count.read())]).astype(np.int64)
        return index

    def bands(self) -> Iterator[np.ndarray]:
        # equal signatures first: copies find each other before anything is compared
        yield band_keys(self.signature, 0, self.signature.shape[1])
        for band in range(self.config.buckets):
            yield band_keys(self.signature, band, self.config.rows)

    def alike(self, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        """Whether the Jaccard similarity of the shingle sets reaches the threshold.

        The share of equal hashes estimates it with a standard deviation of sqrt(J(1-J)/hashes) (Broder 1997); pairs
        that lie five of them below the threshold are not looked at more closely.
        """
        threshold, hashes = self.config.threshold, self.signature.shape[1]
        least = hashes * (threshold - 5 * np.sqrt(0.25 / hashes))
        close = np.zeros(len(i), dtype=bool)
        for low in range(0, len(i), 4096):
            part = slice(low, low + 4096)
            close[part] = (self.signature[i[part]] == self.signature[j[part]]).sum(axis=1) >= least
        for k in np.flatnonzero(close).tolist():
            close[k] = self._jaccard(int(i[k]), int(j[k])) >= threshold
        return close

    def _jaccard(self, i: int, j: int) -> float:
        a, b = self._set(i), self._set(j)
        if len(a) == len(b) and np.array_equal(a, b):
            return 1.0
        shared = len(a) + len(b) - len(np.union1d(a, b))
        return shared / (len(a) + len(b) - shared)

    def _read(self, i: int) -> np.ndarray:
        return np.unique(self.runs[self.starts[i] : self.starts[i + 1]])


Piece = tuple[np.ndarray, list[str]]


def pieces(texts: Iterator[tuple[int, str]]) -> Iterator[Piece]:
    """(numbers, texts), some at a time, so that memory does not grow with the corpus."""
    numbers: list[int] = []
    held: list[str] = []
    size = 0
    for number, text in texts:
        numbers.append(number)
        held.append(text)
        size += len(text) + 64
        if size >= PIECE:
            yield np.array(numbers, dtype=np.int64), held
            numbers, held, size = [], [], 0
    if held:
        yield np.array(numbers, dtype=np.int64), held


def _sign(piece: Piece, *, ngram: int, hashes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(numbers, signatures, 32-bit hashes of all runs, how many runs each text has)."""
    numbers, texts = piece
    found = shingles(texts, ngram)
    return numbers, minima(found, hashes), narrow(found.hashes), np.diff(found.starts)
