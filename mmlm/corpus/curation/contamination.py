"""Runs of words that a training record shares with a val or test record (after Brown et al. 2020, appendix C)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from mmlm.corpus.curation.columns import GrowingArray, in_order
from mmlm.corpus.curation.config import ContaminationConfig
from mmlm.corpus.curation.near_text import Piece, pieces
from mmlm.corpus.curation.shingles import shingles

Texts = Callable[[], Iterator[tuple[int, str]]]
BLOCK = 1 << 20


def shared_runs(
    train: Texts, held: Texts, config: ContaminationConfig, folder: Path, workers: int = 1
) -> dict[int, int]:
    """Training record → the val or test record with which it shares most of its runs, where that is too much.

    Both give (number of the record, text), sorted by number. Runs found in more than `common` records of both sides
    together are left out; of the others the shorter record's share counts. A text shorter than one run has none.
    Memory: 20 bytes per word of the held-out texts; what training texts share with them lies on disk.
    """
    assert config.ngram is not None
    cut = partial(_distinct, ngram=config.ngram)
    held_runs, held_record, held_size = _all_runs(in_order(cut, pieces(held()), workers))
    if not len(held_runs):
        return {}
    order = np.lexsort((held_record, held_runs))
    held_runs, held_record = held_runs[order], held_record[order]
    runs, first, seen = np.unique(held_runs, return_index=True, return_counts=True)
    seen = seen.astype(np.int64)
    hits = GrowingArray(folder / "hits", np.int64, 2)
    train_size: dict[int, int] = {}
    for record, run, size in in_order(cut, pieces(train()), workers):
        at = np.minimum(np.searchsorted(runs, run), len(runs) - 1)
        hit = runs[at] == run
        seen += np.bincount(at[hit], minlength=len(runs)) if hit.sum() * 8 > len(runs) else 0
        if hit.sum() * 8 <= len(runs):
            np.add.at(seen, at[hit], 1)
        touched = set(record[hit].tolist())
        train_size |= {r: s for r, s in size.items() if r in touched}
        hits.append(np.stack([record[hit], at[hit]], axis=1))
    wording = seen > config.common
    for record, number in zip(
        *np.unique(held_record[wording[np.searchsorted(runs, held_runs)]], return_counts=True), strict=True
    ):
        held_size[int(record)] -= int(number)
    bounds = np.append(first, len(held_runs))
    return _too_much(hits.read().reshape(-1, 2), wording, bounds, held_record, held_size, train_size, config.share)


def _too_much(
    hits: np.ndarray, wording: np.ndarray, bounds: np.ndarray, held_record: np.ndarray, held_size: dict[int, int],
    train_size: dict[int, int], share: float,
) -> dict[int, int]:  # fmt: skip
    found: dict[int, int] = {}
    low = 0
    while low < len(hits):
        high = min(low + BLOCK, len(hits))
        if high < len(hits):  # a record is not torn apart, unless it fills the block by itself
            start = int(np.searchsorted(hits[low:high, 0], hits[high - 1, 0])) + low
            high = start if start > low else int(np.searchsorted(hits[:, 0], hits[low, 0], "right"))
        record, run = hits[low:high].T
        low = high
        common = wording[run]
        for r, number in zip(*np.unique(record[common], return_counts=True), strict=True):
            train_size[int(r)] -= int(number)
        record, run = record[~common], run[~common]
        size = bounds[run + 1] - bounds[run]
        ramp = np.arange(size.sum()) - np.repeat(np.cumsum(size) - size, size)
        pairs = np.stack([np.repeat(record, size), held_record[np.repeat(bounds[run], size) + ramp]], axis=1)
        both, number = np.unique(pairs, axis=0, return_counts=True)
        most: dict[int, float] = {}
        for (r, h), n in zip(both.tolist(), number.tolist(), strict=True):
            part = n / min(train_size[r], held_size[h])
            if part >= share and part > most.get(r, 0.0):
                most[r], found[r] = part, h
    return found


Runs = tuple[np.ndarray, np.ndarray, dict[int, int]]
"""(record, run) of each distinct run of each record, sorted by record, and record → how many it has."""


def _distinct(piece: Piece, *, ngram: int) -> Runs:
    numbers, texts = piece
    found = shingles(texts, ngram)
    record = np.repeat(np.arange(len(texts)), np.diff(found.starts))
    long = found.words[record] >= ngram
    record, run = record[long], found.hashes[long]
    order = np.lexsort((run, record))
    record, run = record[order], run[order]
    new = np.ones(len(run), dtype=bool)
    new[1:] = (run[1:] != run[:-1]) | (record[1:] != record[:-1])
    record, run = numbers[record[new]], run[new]
    which, size = np.unique(record, return_counts=True)
    return record, run, dict(zip(which.tolist(), size.tolist(), strict=True))


def _all_runs(parts: Iterator[Runs]) -> tuple[np.ndarray, np.ndarray, dict[int, int]]:
    records, runs = [np.empty(0, np.int64)], [np.empty(0, np.uint64)]
    sizes: dict[int, int] = {}
    for record, run, size in parts:
        records.append(record)
        runs.append(run)
        sizes |= size
    return np.concatenate(runs), np.concatenate(records), sizes
