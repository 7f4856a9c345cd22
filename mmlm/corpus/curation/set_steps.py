"""The steps that look at all records: duplicates, near-duplicates, what train knows of test, and balance.

Each step sees what the step before it left. Which record stays never depends on the order in which anything was read:
rows are sorted by id, and of records that are alike the owner stays, a test record before a val record before a train
record, then the one with the smallest id.
Memory: some 200 bytes a record whatever its size, one entry for each dropped one, 20 bytes for each held-out word when
shared runs are looked for, and of pictures the largest one, decoded, beside some dozens of megabytes. Signatures,
shingles and colours of pictures are on disk, below `folder`, and mapped.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmlm.corpus.curation.balance import caps, position, surplus
from mmlm.corpus.curation.config import CurateConfig, NearImagesConfig, NearTextConfig
from mmlm.corpus.curation.contamination import shared_runs
from mmlm.corpus.curation.events import Event, Figures
from mmlm.corpus.curation.linking import known_to, losers, sets_of
from mmlm.corpus.curation.near_images import Look, Picture, PictureIndex, Place, look, read_ahead
from mmlm.corpus.curation.near_text import TextIndex
from mmlm.corpus.records import SPLITS
from mmlm.errors import DataError, TooLargeError
from mmlm.storage import MAX_FILE_BYTES, split_fragment

Rows = Callable[[], Iterator[dict[str, Any]]]
Read = Callable[[str, int], bytes]
"""(uri, most bytes) → what lies there. Raises TooLargeError where it is more."""
TRAIN = SPLITS.index("train")
_MEDIA = ("image", "audio", "video")
_READERS = 4
LARGE = 4 << 20
"""Bytes of a picture file that is not held until its turn comes."""


@dataclass(frozen=True, slots=True)
class Drops:
    """id → what dropped the record; and the counts of every step that is on, also where it dropped nothing."""

    events: dict[str, Event]
    figures: dict[str, dict[str, dict[str, int]]]
    """{step: {source: {kept, dropped, changed}}}"""
    reasons: dict[str, dict[str, dict[str, int]]]
    """{step: {source: {reason: number}}}"""


def find_drops(
    rows: Rows, config: CurateConfig, read: Read, folder: Path, workers: int = 1, wordings: frozenset[str] = frozenset()
) -> Drops:
    """What the set steps of `config` drop.

    `rows()` gives rows of SCHEMA sorted by id, with their final split; it is called once a step and more. `read(uri, most)`
    gives the bytes of a picture; what it raises as OSError or DataError leaves the picture out of the comparison.
    `folder` is made, filled and removed again. The result does not depend on `workers`. `wordings` are the questions
    that the config itself puts to every record: two pictures are copies although they were asked in two languages.
    """
    if not config.set_steps:
        return Drops({}, {}, {})
    try:
        work = _Work(rows, config, read, folder, workers, wordings)
        for step in config.set_steps:
            getattr(work, f"_{step}")()
            work.close(step)
        return work.drops()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Work:
    def __init__(
        self, rows: Rows, config: CurateConfig, read: Read, folder: Path, workers: int, wordings: frozenset[str]
    ) -> None:
        self.wordings = wordings
        self.alone = ThreadPoolExecutor(1)
        """Looks at large pictures, one at a time: freed in other threads, their memory would not come back."""
        self.rows, self.config, self.read, self.folder, self.workers = rows, config, read, folder, workers
        self.lost: dict[int, tuple[str, str, int | None]] = {}
        """record → (step, reason, the record on whose account)"""
        self.fresh: dict[int, tuple[str, int | None]] = {}
        self.figures = Figures(config.set_steps)
        self.indexes: dict[str, TextIndex | PictureIndex] = {}
        self._look()

    def _look(self) -> None:
        """What is needed of every record, in arrays."""
        sources: dict[str, int] = {}
        split, source = bytearray(), []
        numbers: list[np.ndarray] = []
        held: list[tuple[int, ...]] = []
        for row in self.rows():
            split.append(SPLITS.index(row["split"]))
            source.append(sources.setdefault(row["source"], len(sources)))
            content = row["content_hash"] or _content_of(row)
            held.append(
                (
                    _number("g", row["group"]), *_numbers(row["task"], content), _number("t", row["task"]),
                    _beside(row), _asked(row, self.wordings),
                )
            )  # fmt: skip
            if len(held) == 65_536:
                numbers.append(np.array(held, dtype=np.uint64))
                held = []
        numbers.append(np.array(held, dtype=np.uint64).reshape(-1, 6))
        table = np.concatenate(numbers)
        self.group, self.content, self.content_2, self.task, self.beside, self.asked = (c.copy() for c in table.T)
        self.split = np.frombuffer(bytes(split), dtype=np.uint8)
        self.source, self.sources = np.array(source, dtype=np.int32), list(sources)
        self.alive = np.ones(len(self.split), dtype=bool)

    # one method for each step, named as in the config

    def _exact(self) -> None:
        order = np.lexsort((np.arange(len(self.split)), -self.split.astype(np.int64), self.content_2, self.content))
        a, b = self.content[order], self.content_2[order]
        new = np.append(True, (a[1:] != a[:-1]) | (b[1:] != b[:-1])) if len(order) else np.empty(0, bool)
        owner = order[np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))]
        for gone, kept in zip(order[~new].tolist(), owner[~new].tolist(), strict=True):
            self._drop(gone, self._as_copy("duplicate", gone, kept), kept)

    def _near_text(self) -> None:
        assert self.config.near_text
        index = self._texts(self.config.near_text)
        # other tasks and other media make other records of the same words
        self._drop_copies(index, _joined(self.task[index.row], self.beside[index.row]))

    def _near_images(self) -> None:
        assert self.config.near_images
        index = self._pictures(self.config.near_images)
        # one picture may be asked several questions: each is a record of its own
        self._drop_copies(index, _joined(self.task[index.row], self.asked[index.row]))

    def _drop_copies(self, index: TextIndex | PictureIndex, kind: np.ndarray) -> None:
        for gone, kept in losers(sets_of(index, kind), index.row, self.split, self.group).items():
            self._drop(gone, self._as_copy("near_duplicate", gone, kept), kept)

    def _contamination(self) -> None:
        config = self.config.contamination
        assert config
        if not (self.split[self.alive] != TRAIN).any():
            return
        if config.groups:
            held = self.alive & (self.split != TRAIN)
            groups, where = np.unique(self.group[held], return_index=True)
            owner = np.flatnonzero(held)[where]
            for gone in np.flatnonzero(self.alive & (self.split == TRAIN) & np.isin(self.group, groups)).tolist():
                self._leak(gone, int(owner[np.searchsorted(groups, self.group[gone])]), "group")
        if config.ngram is not None:
            found = shared_runs(
                lambda: self._texts_of(lambda n: self.split[n] == TRAIN, bare=True),
                lambda: self._texts_of(lambda n: self.split[n] != TRAIN, bare=True),
                config, self.folder / "runs", self.workers,
            )  # fmt: skip
            for gone, owner_row in sorted(found.items()):
                self._leak(gone, owner_row, "shared_runs")
        if config.near_text:
            texts = self._texts(config.near_text)
            self._known(texts, self.beside[texts.row], "near_text")
        if config.near_images:
            pictures = self._pictures(config.near_images).single()
            self._known(pictures, np.zeros(len(pictures.row), dtype=np.uint64), "near_image")

    def _known(self, index: TextIndex | PictureIndex, kind: np.ndarray, reason: str) -> None:
        row = index.row
        here = self.alive[row] & ~np.isin(row, list(self.fresh))
        train = np.flatnonzero(here & (self.split[row] == TRAIN))
        held = np.flatnonzero(here & (self.split[row] != TRAIN))
        for gone, owner in sorted(known_to(index, kind, train, held).items()):
            self._leak(int(row[gone]), int(row[owner]), reason)

    def _balance(self) -> None:
        config = self.config.balance
        assert config
        mine = self.alive & (self.split == TRAIN)
        counts = np.bincount(self.source[mine], minlength=len(self.sources))
        sizes = dict(zip(self.sources, counts.tolist(), strict=True))
        if unknown := sorted(set(config.sources) - set(sizes)):
            raise DataError(
                f"scan.curate.balance.sources names {unknown[0]!r}, which is no source of the corpus",
                wanted=f"one of {', '.join(sorted(sizes)[:8])}",
            )
        keep = caps(sizes, config)
        cut = [k for k, s in enumerate(self.sources) if keep.get(s, 0) < sizes[s]]
        if not cut:
            return
        wanted = np.zeros(len(self.sources), dtype=bool)
        wanted[cut] = True
        places = np.zeros(len(self.split), dtype=np.uint64)
        for number, row in enumerate(self.rows()):
            if mine[number] and wanted[self.source[number]]:
                places[number] = position(row["id"], config.salt)
        for k in cut:
            members = np.flatnonzero(mine & (self.source == k))
            for gone in surplus(places[members], members, keep[self.sources[k]]).tolist():
                self._drop(gone, "over_cap", None)

    # what they share

    def _drop(self, gone: int, reason: str, owner: int | None) -> None:
        self.fresh.setdefault(gone, (reason, owner))

    def _leak(self, gone: int, owner: int, what: str) -> None:
        self._drop(gone, f"{what}_in_{SPLITS[self.split[owner]]}", owner)

    def _as_copy(self, word: str, gone: int, owner: int) -> str:
        """The reason; a record that goes because a held-out one is like it is told apart."""
        held = self.split[owner] != TRAIN and self.split[gone] != self.split[owner]
        return f"{word}_of_{SPLITS[self.split[owner]]}" if held else word

    def close(self, step: str) -> None:
        """Count a step that is done and take away what it dropped."""
        before = np.bincount(self.source[self.alive], minlength=len(self.sources))
        gone = np.array(sorted(self.fresh), dtype=np.int64)
        self.alive[gone] = False
        after = np.bincount(self.source[self.alive], minlength=len(self.sources))
        for source, b, a in zip(self.sources, before.tolist(), after.tolist(), strict=True):
            self.figures.add(step, source, "kept", a)
            self.figures.add(step, source, "dropped", b - a)
        for number, (reason, owner) in self.fresh.items():
            self.figures.reason(step, self.sources[self.source[number]], reason)
            self.lost[number] = (step, reason, owner)
        self.fresh = {}

    def drops(self) -> Drops:
        wanted = set(self.lost) | {owner for _, _, owner in self.lost.values() if owner is not None}
        names = {n: row["id"] for n, row in enumerate(self.rows()) if n in wanted} if wanted else {}
        events = {
            names[number]: Event(step, "dropped", reason, f"like {names[owner]}" if owner is not None else "")
            for number, (step, reason, owner) in sorted(self.lost.items())
        }
        return Drops(events, self.figures.counts(), self.figures.reasons())

    def _texts(self, config: NearTextConfig) -> TextIndex:
        """The index of the texts of the records that are left; one made by an earlier step serves again."""
        key = f"text {config.model_dump_json()}"
        if key not in self.indexes:
            folder = self.folder / f"text-{len(self.indexes)}"
            self.indexes[key] = TextIndex.build(self._texts_of(lambda n: True), config, folder, self.workers)
        found = self.indexes[key]
        assert isinstance(found, TextIndex)
        return found

    def _texts_of(self, wanted: Callable[[int], bool], bare: bool = False) -> Iterator[tuple[int, str]]:
        """(number, text) of the wanted records that are left; with `bare` only of those that consist of text."""
        for number, row in enumerate(self.rows()):
            if self.alive[number] and number not in self.fresh and wanted(number):
                if bare and any(p["kind"] != "text" for p in row["parts"]):
                    continue
                if text := text_of(row):
                    yield number, text

    def _pictures(self, config: NearImagesConfig) -> PictureIndex:
        if "pictures" not in self.indexes:  # made once for whatever distance
            files = read_ahead(self._places(), self._picture, _READERS, lambda item: len(item[1]["data"] or b""))
            self.indexes["pictures"] = PictureIndex.build(files, config, self.folder / "pictures", self.workers)
        found = self.indexes["pictures"]
        assert isinstance(found, PictureIndex)
        return found.of(config)

    def _places(self) -> Iterator[tuple[Place, dict[str, Any]]]:
        for number, row in enumerate(self.rows()):
            if self.alive[number] and number not in self.fresh:
                parts = [p for p in row["parts"] if p["kind"] == "image"]
                yield from (((number, len(parts), at), part) for at, part in enumerate(parts))

    def _picture(self, item: tuple[Place, dict[str, Any]]) -> Picture:
        """A picture's file; one of more than LARGE bytes is looked at right here, and no two of them at a time."""
        place, part = item
        try:
            data = part["data"] if part["uri"] is None else self.read(part["uri"], LARGE)
            if not data or len(data) <= LARGE:
                return place, data or None
        except TooLargeError:
            pass
        except (OSError, DataError):
            return place, None
        return place, self.alone.submit(self._large, part).result()

    def _large(self, part: dict[str, Any]) -> Look | None:
        try:
            return look(part["data"] if part["uri"] is None else self.read(part["uri"], MAX_FILE_BYTES))
        except (OSError, DataError):
            return None


def text_of(row: dict[str, Any]) -> str:
    """The text of a row of SCHEMA by which it is compared: user and context parts and the answer."""
    texts = [p["text"] for p in row["parts"] if p["kind"] == "text" and p["role"] != "system" and p["text"]]
    return "\n".join([*texts, row["answer"]] if row["answer"] else texts)


def _beside(row: dict[str, Any]) -> int:
    """A number for what is not text: media and fields. 0: nothing."""
    held = [
        (p["kind"], _medium(p) if p["kind"] in _MEDIA else p["fields"]) for p in row["parts"] if p["kind"] != "text"
    ]
    return _number("b", json.dumps(held)) if held else 0


def _medium(part: dict[str, Any]) -> list[Any]:
    """What tells a medium from others: its bytes and the seconds of them, wherever it lies; its place in a manifest
    that has no hash of it."""
    if part["data"] is not None:
        return [hashlib.sha256(part["data"]).hexdigest(), None]
    known = part.get("sha256")  # manifests of before have none
    return [known, split_fragment(part["uri"])[1]] if known else [part["uri"]]


def _asked(row: dict[str, Any], wordings: frozenset[str]) -> int:
    """A number for all of a record that is neither picture nor wording: questions, context, sounds, fields, answers."""
    held = [
        p["text"] if p["kind"] == "text" else _medium(p) if p["kind"] in _MEDIA else p["fields"]
        for p in row["parts"]
        if p["kind"] != "image" and not (p["kind"] == "text" and p["text"] in wordings)
    ]
    target = [row["label"], row["labels"], row["number"], row["answer"]]
    return _number("a", json.dumps([held, target]))


def _content_of(row: dict[str, Any]) -> str:
    """The content of a row that has no hash of it: everything but what names it."""
    parts = [[p["kind"], p["role"], p["text"], p["fields"], p["uri"], (p["data"] or b"").hex()] for p in row["parts"]]
    return json.dumps([parts, row["label"], row["labels"], row["number"], row["answer"]])


def _joined(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """One 64-bit number for two."""
    return (a * np.uint64(0x9FB21C651E98DF25)) ^ b


def _number(*texts: str) -> int:
    return _numbers(*texts)[0]


def _numbers(*texts: str) -> tuple[int, int]:
    """Two 64-bit numbers for some texts."""
    digest = hashlib.blake2b("\0".join(texts).encode("utf-8", "surrogatepass"), digest_size=16).digest()
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big")
