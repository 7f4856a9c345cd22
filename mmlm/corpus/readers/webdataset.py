"""Existing WebDataset tars → drafts. Members with one key make a sample; their media are addressed in place.

A sample becomes a row: a column per ending (`jpg`, `txt`, `json`), `__key__`, and `_images`, `_audios`, `_videos`, which
are all members of that kind. The row is then read like one of a table. Pickles are never read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

from mmlm.config import unsigned
from mmlm.corpus.config import CAPTION, Ask, TableMap, TableSource, WebDatasetSource
from mmlm.corpus.drafts import SPLIT_NAMES, Outcomes, Refusal, RefuseError, decode_text
from mmlm.corpus.readers.rows import Row, parse_json
from mmlm.corpus.readers.table import read_asked
from mmlm.corpus.readers.tar import Member, read_members
from mmlm.corpus.select import find
from mmlm.corpus.sniff import AUDIO_ENDINGS, IMAGE_ENDINGS, VIDEO_ENDINGS
from mmlm.errors import DataError

PICKLES = {"pyd", "pkl", "pickle", "pth", "pt", "joblib", "dill", "ckpt"}
"""Endings of files whose reading could run what is in them."""
TEXTS = ("txt", "caption", "cap", "text", "transcript")
_READ = {*TEXTS, "cls", "cls2", "id", "index", "json", "lang", "split"}
MAX_TEXT = 1 << 20
"""Bytes of the longest text member that is read."""
MAX_JSON = 16 << 20
"""Bytes of the longest JSON member that is read."""
MAX_MEMBERS = 1000
"""Members of one sample."""
_PEEKED = 32
"""Samples that are looked at to infer what is what."""
_MEDIA = {"_images": IMAGE_ENDINGS, "_audios": AUDIO_ENDINGS, "_videos": VIDEO_ENDINGS}
_WHICH = {"en": "Which class is this?", "zh": "这是哪一类？"}

Sample = tuple[str, Row | Refusal, str]
"""(tar shown, its row, its split)."""


def read_webdataset(
    source: WebDatasetSource, files: Iterable[tuple[str, Path]], data: str, repeats: dict[int, int] | None = None
) -> Outcomes:
    """Drafts of every sample of `files` ((name, path)).

    Raises DataError when it cannot be inferred what is to be answered.
    """
    samples = (sample for name, path in files for sample in samples_of(source, name, path))
    peeked: list[Sample] = []
    rows = 0
    for sample in samples:
        peeked.append(sample)
        rows += not isinstance(sample[1], Refusal)
        if rows == _PEEKED:
            break
    if not rows:
        yield from (refusal for _, refusal, _ in peeked if isinstance(refusal, Refusal))
        return
    table = inferred(source, [row[1] for _, row, _ in islice(peeked, 10_000) if not isinstance(row, Refusal)])
    yield from read_asked(table, chain(peeked, samples), data, True, repeats)


def inferred(source: WebDatasetSource, rows: list[dict[str, Any]]) -> TableSource:
    """The source as a table: what its map and questions leave open is inferred from `rows`.

    Raises DataError when no member is a target that people commonly use.
    """
    found = {k: True for row in rows for k, v in row.items() if v}
    columns = source.map.model_dump()
    if not source.map.id:
        columns["id"] = "__id__"
    for kind, column in (("image", "_images"), ("audio", "_audios"), ("video", "_videos")):
        if not columns[kind] and column in found:
            columns[kind] = [column]
            columns["many"] = "all"
    media = any(columns[kind] for kind in ("image", "audio", "video"))
    return TableSource(
        kind="table", files=source.files, map=TableMap(**columns), ask=source.ask or _asks(rows, media, source.files),
        lang=source.lang, license=source.license, split=source.split,
    )  # fmt: skip


def _asks(rows: list[dict[str, Any]], media: bool, files: list[str]) -> list[Ask]:
    def first(*selectors: str) -> str | None:
        return next((s for s in selectors if any(find(row, s) for row in rows)), None)

    question, answer = first("json.question", "json.prompt"), first("json.answer")
    if question and answer:
        return [Ask(task="answer", text=question, answer=answer)]
    text = first(*TEXTS, "json.caption", "json.text", "json.transcript", "json.answer")
    label = first("cls", "json.label", "json.class", "json.category")
    if label and text and not media:
        return [Ask(task="category", text=text, label=label)]
    asks = [Ask(task="caption", question=CAPTION, answer=text)] if text and media else []
    asks += [Ask(task="category", question=_WHICH, label=label)] if label and media else []
    if not asks:
        endings = sorted({k for row in rows for k in row if not k.startswith("_")})
        raise DataError(
            f"{', '.join(map(unsigned, files))}: no member with a caption or a class among {', '.join(endings)[:200]}",
            wanted="txt, caption, cls, or json with caption, answer or label",
            cure="say in `ask` where the target lies, such as {task: caption, answer: json.title}",
        )
    return asks


def samples_of(source: WebDatasetSource, name: str, path: Path) -> Iterator[Sample]:
    """The samples of one tar. A signature in `name` is in the addresses of media only, not in what tells of a sample."""
    shown = unsigned(name)
    split = split_in_name(shown)
    ignored = {e.lower().lstrip(".") for e in source.ignore}
    try:
        with path.open("rb") as f:
            sample = _Sample(name, f)
            try:
                for member in read_members(f, os.fstat(f.fileno()).st_size):
                    key, ending = split_key(member.name)
                    passed_over = not ending or ending in ignored or ending.rpartition(".")[2] in ignored
                    if passed_over and not member.problem:  # hidden files have no ending
                        continue
                    if key != sample.key:
                        if sample.members:
                            yield shown, sample.finish(), split
                        sample = _Sample(name, f, key)
                    sample.add(ending, member)
            except RefuseError as error:
                if error.reason == "truncated_tar" and sample.members and not sample.refused:
                    sample.refuse("truncated_tar", "the tar ends within or right behind it")
                if sample.members:
                    yield shown, sample.finish(), split
                yield shown, Refusal(shown, "", error.reason, error.detail), split
                return
            if sample.members:
                yield shown, sample.finish(), split
    except OSError as error:
        yield shown, Refusal(shown, "", "unreadable_file", error.strerror or str(error)), split


def split_key(name: str) -> tuple[str, str]:
    """`a/b.left.jpg` → (`a/b`, `left.jpg`), as the WebDataset format has it; no ending for hidden files."""
    folder, slash, base = name.rpartition("/")
    stem, _, ending = base.partition(".")
    return (folder + slash + stem, ending.lower()) if stem else (name, "")


def split_in_name(name: str) -> str:
    """The split that a path tells: a word of the file's name (`cats-train-000.tar`), else a folder called so."""
    *folders, base = name.lower().split("/")
    words = {SPLIT_NAMES[w] for w in re.split(r"[^a-z]+", base) if w in SPLIT_NAMES}
    if len(words) == 1:
        return words.pop()
    return next((SPLIT_NAMES[f] for f in reversed(folders) if f in SPLIT_NAMES), "") if not words else ""


class _Sample:
    """The members of one key, gathered into a row."""

    def __init__(self, uri: str, file: BinaryIO, key: str = "") -> None:
        self.uri, self.file, self.key, self.members = uri, file, key, 0
        self.where = f"{unsigned(uri)}/{key}"
        self.row: dict[str, Any] = {"__key__": key, "__id__": self.where}
        self.refused: Refusal | None = None

    def refuse(self, reason: str, detail: str) -> None:
        self.refused = self.refused or Refusal(self.where, self.where, reason, detail)

    def add(self, ending: str, member: Member) -> None:
        self.members += 1
        if self.refused:
            return
        last = ending.rpartition(".")[2]
        try:
            if member.problem:
                raise RefuseError(member.problem, f"{member.name[:80]!r}: {member.detail}")
            if last in PICKLES:
                raise RefuseError("pickle", f"{member.name[:80]!r} is never read; `ignore: [{last}]` passes it over")
            if ending in self.row:
                raise RefuseError("duplicate_member", f"two members end in {ending!r}")
            if self.members > MAX_MEMBERS:
                raise RefuseError("too_many_members", f"more than {MAX_MEMBERS} members")
            if last in _READ:
                self.row[ending] = self.text(last, member)
            else:
                place = {"uri": f"{self.uri}#bytes={member.offset}+{member.size}"}
                self.row[ending] = place
                for column, endings in _MEDIA.items():
                    if f".{last}" in endings:
                        self.row.setdefault(column, []).append((ending, place))
        except RefuseError as error:
            self.refuse(error.reason, error.detail)

    def text(self, ending: str, member: Member) -> Any:
        most = MAX_JSON if ending == "json" else MAX_TEXT
        if member.size > most:
            raise RefuseError("too_large", f"{member.name[:80]!r} has more than {most:,} bytes")
        self.file.seek(member.offset)
        data = self.file.read(member.size)
        if ending != "json":
            return decode_text(data).strip()
        try:
            return parse_json(data)
        except ValueError as error:
            raise RefuseError("bad_json", f"{member.name[:80]!r}: {error}") from None

    def finish(self) -> Row | Refusal:
        """The row; its media by ending, so that their order in the tar does not matter."""
        for column in _MEDIA:
            if column in self.row:
                self.row[column] = [place for _, place in sorted(self.row[column], key=lambda pair: pair[0])]
        return self.refused or (self.where, self.row)
