"""Which records stand for all of them: drawn by a hash of their ids, so evenly over the corpus and always the same ones.

Ids often begin with a language or a source; what comes first in their order is no sample.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmlm.corpus.records import read_batches

PARTS = 1 << 20
"""Equal parts of a corpus by the hash of the id, which are taken or left as a whole."""
MOST_LANGS = 1_000
"""Languages of which some records are drawn at least; of those that come later in order of id as many as chance gives."""
_NUMBER = 12
"""Bytes of a number as text, at most (`features.encode.answer_text`)."""


def drawn_for_training(manifest: Path, most: int) -> Callable[[str], bool] | None:
    """Which ids to take so that the texts of the training split have at most `most` bytes; None: all of them.

    What is counted is the most that a record's texts can have, from the columns that take no time to read. A part that does
    not fit any more is left, and smaller ones are looked for; where not one fits, all records are taken.
    """
    if sum(int(_sizes(chunk).sum()) for chunk in read_batches(manifest, columns=_COUNTED)) <= most:
        return None
    sizes = np.zeros(PARTS, np.int64)
    for chunk in read_batches(manifest, columns=["id", *_COUNTED]):
        at = np.fromiter((_place(name) % PARTS for name in chunk.column("id").to_pylist()), np.int64, len(chunk))
        np.add.at(sizes, at, _sizes(chunk))
    taken, held = np.zeros(PARTS, bool), 0
    for part in np.flatnonzero(sizes).tolist():
        if held + int(sizes[part]) <= most:
            taken[part] = True
            held += int(sizes[part])
    return (lambda name: bool(taken[_place(name) % PARTS])) if held else None


_COUNTED = ["split", "text_bytes", "labels", "number"]


def _sizes(rows: pa.RecordBatch) -> np.ndarray:
    """(rows,) bytes of text of each, at most; 0 outside the training split."""
    split = rows.column("split")
    learnt = pc.or_(pc.equal(pc.fill_null(split, ""), ""), pc.equal(pc.fill_null(split, ""), "train"))
    size = pc.add(
        pc.cast(pc.fill_null(rows.column("text_bytes"), 0), pa.int64()),
        pc.multiply(pc.cast(pc.fill_null(pc.list_value_length(rows.column("labels")), 0), pa.int64()), 2),
    )
    size = pc.add(size, pc.multiply(pc.cast(pc.is_valid(rows.column("number")), pa.int64()), _NUMBER))
    return np.asarray(pc.multiply(size, pc.cast(learnt, pa.int64())))


def drawn_for_report(manifest: Path, most: int, each: int) -> set[str]:
    """The ids of `most` records, and of at least `each` of every language that has so many."""
    every: list[tuple[int, str]] = []
    by_lang: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for chunk in read_batches(manifest, columns=["id", "lang"]):
        for name, lang in zip(chunk.column("id").to_pylist(), chunk.column("lang").to_pylist(), strict=True):
            drawn = (-_place(name), name)
            _keep_smallest(every, drawn, most)
            if lang in by_lang or len(by_lang) < MOST_LANGS:
                _keep_smallest(by_lang[lang], drawn, each)
    return {name for heap in (every, *by_lang.values()) for _, name in heap}


def _keep_smallest(heap: list[tuple[int, str]], drawn: tuple[int, str], most: int) -> None:
    if len(heap) < most:
        heapq.heappush(heap, drawn)
    elif drawn > heap[0]:
        heapq.heapreplace(heap, drawn)


def _place(name: str) -> int:
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8, person=b"mmlm draw").digest()
    return int.from_bytes(digest, "big")
