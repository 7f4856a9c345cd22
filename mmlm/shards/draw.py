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

from mmlm.corpus.records import read_rows

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
    sizes = np.zeros(PARTS, np.int64)
    for row in read_rows(manifest, columns=["id", "split", "text_bytes", "labels", "number"]):
        if (row["split"] or "train") == "train":
            size = (row["text_bytes"] or 0) + 2 * len(row["labels"] or ())
            sizes[_place(row["id"]) % PARTS] += size + (_NUMBER if row["number"] is not None else 0)
    if int(sizes.sum()) <= most:
        return None
    taken, held = np.zeros(PARTS, bool), 0
    for part in np.flatnonzero(sizes).tolist():
        if held + int(sizes[part]) <= most:
            taken[part] = True
            held += int(sizes[part])
    return (lambda name: bool(taken[_place(name) % PARTS])) if held else None


def drawn_for_report(manifest: Path, most: int, each: int) -> set[str]:
    """The ids of `most` records, and of at least `each` of every language that has so many."""
    every: list[tuple[int, str]] = []
    by_lang: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for row in read_rows(manifest, columns=["id", "lang"]):
        drawn = (-_place(row["id"]), row["id"])
        _keep_smallest(every, drawn, most)
        if row["lang"] in by_lang or len(by_lang) < MOST_LANGS:
            _keep_smallest(by_lang[row["lang"]], drawn, each)
    return {name for heap in (every, *by_lang.values()) for _, name in heap}


def _keep_smallest(heap: list[tuple[int, str]], drawn: tuple[int, str], most: int) -> None:
    if len(heap) < most:
        heapq.heappush(heap, drawn)
    elif drawn > heap[0]:
        heapq.heapreplace(heap, drawn)


def _place(name: str) -> int:
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8, person=b"mmlm draw").digest()
    return int.from_bytes(digest, "big")
