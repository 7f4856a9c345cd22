"""The media of drafts, read once each: hash of the bytes and what the header says, in a few threads."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from mmlm.corpus.drafts import Draft, Refusal, RefuseError
from mmlm.corpus.records import Part, Record
from mmlm.corpus.sniff import Header, read_header
from mmlm.errors import DataError
from mmlm.storage import is_remote, read_uri, resolve, sha256_bytes, sha256_json

CACHED = 100_000
"""Media files whose hash and header are remembered, so that a file that many records use is read once."""
BATCH = 512
CHUNK = 32
"""Files that one thread takes at a time; one by one, handing them over costs more than reading them."""


@dataclass(frozen=True, slots=True)
class Looked:
    """A draft after its media were looked at. `headers` are those of its media parts; `dropped` what was left out."""

    record: Record
    where: str
    headers: tuple[Header, ...]
    dropped: tuple[Refusal, ...] = ()


class MediaReader:
    """Looks at the media of drafts. `drop`: keep a record without its broken parts as long as others are left."""

    def __init__(self, data: Path, *, drop: bool, allow_remote: bool, threads: int) -> None:
        self.data, self.drop, self.allow_remote, self.threads = data, drop, allow_remote, threads
        self.known: OrderedDict[tuple[str, str], tuple[str, Header] | RefuseError] = OrderedDict()

    def look(self, outcomes: Iterable[Draft | Refusal]) -> Iterator[Looked | Refusal]:
        """The outcomes in order; drafts with their content hash, or a Refusal naming the broken part."""
        stream = iter(outcomes)
        with ThreadPoolExecutor(self.threads) as pool:
            while batch := list(islice(stream, BATCH)):
                parts: dict[tuple[str, str], None] = {}
                for outcome in batch:
                    if isinstance(outcome, Draft):
                        parts |= {(p.kind, p.uri): None for p in outcome.record.parts if p.uri is not None}
                todo = [key for key in parts if key not in self.known]
                chunks = [todo[at : at + CHUNK] for at in range(0, len(todo), CHUNK)]
                for chunk, found in zip(chunks, pool.map(self._read_all, chunks), strict=True):
                    self.known |= zip(chunk, found, strict=True)
                yield from (o if isinstance(o, Refusal) else self._finish(o) for o in batch)
                while len(self.known) > CACHED:
                    self.known.popitem(last=False)

    def _read_all(self, keys: list[tuple[str, str]]) -> list[tuple[str, Header] | RefuseError]:
        return [self._read(key) for key in keys]

    def _read(self, key: tuple[str, str]) -> tuple[str, Header] | RefuseError:
        kind, uri = key
        try:
            if kind == "video":
                raise RefuseError("unsupported_kind", "a video; wanted pictures and sounds")
            return self._header(kind, self._bytes(uri))
        except RefuseError as error:
            return RefuseError(error.reason, f"{uri}: {error.detail}")

    def _bytes(self, uri: str) -> bytes:
        if is_remote(uri) and not self.allow_remote:
            raise RefuseError("remote_uri", "it lies elsewhere; fetch it, or set allow_remote: true")
        try:
            return read_uri(uri, self.data)
        except DataError as error:
            missing = not is_remote(uri) and not os.path.exists(resolve(uri, self.data))
            raise RefuseError("missing_file" if missing else "unreadable_file", str(error)) from None
        except OSError as error:
            raise RefuseError("unreadable_file", error.strerror or str(error)) from None

    @staticmethod
    def _header(kind: str, data: bytes) -> tuple[str, Header]:
        return sha256_bytes(data), read_header(data, kind)

    def _finish(self, draft: Draft) -> Looked | Refusal:
        record = draft.record
        kept: list[Part] = []
        hashes: list[str] = []
        headers: list[Header] = []
        dropped: list[Refusal] = []
        for part in record.parts:
            if part.kind not in ("image", "audio", "video"):
                kept.append(part)
                continue
            found = self._inline(part) if part.uri is None else self.known[(part.kind, part.uri)]
            if not isinstance(found, RefuseError):
                kept.append(part)
                hashes.append(found[0])
                headers.append(found[1])
            elif self.drop:
                dropped.append(Refusal(draft.where, record.id, found.reason, found.detail))
            else:
                return Refusal(draft.where, record.id, found.reason, found.detail)
        if dropped and not any(p.modality != "text" for p in kept):
            return dropped[0]
        try:
            record = _hashed(replace(record, parts=tuple(kept)), hashes)
        except UnicodeEncodeError:
            return Refusal(draft.where, ascii(record.id), "bad_encoding", "a text with half a surrogate pair in it")
        return Looked(record, draft.where, tuple(headers), tuple(dropped))

    def _inline(self, part: Part) -> tuple[str, Header] | RefuseError:
        try:
            return self._header(part.kind, part.data or b"")
        except RefuseError as error:
            return RefuseError(error.reason, f"inline {part.kind}: {error.detail}")


def _hashed(record: Record, media: list[str]) -> Record:
    """The record with its content hash, and with a group made of its content where it has none.

    Raises UnicodeEncodeError when a text of it cannot be stored.
    """
    hashes = iter(media)
    content = [
        [p.kind, p.role, p.text if p.kind == "text" else p.fields if p.kind == "fields" else next(hashes)]
        for p in record.parts
    ]
    target = record.target
    group = record.group or sha256_json(sorted(media) if media else content)
    names = (record.id, record.task, record.split, group, record.lang, record.source, record.license)
    "".join(names).encode()  # a manifest holds UTF-8; the content is tried by its hash
    whole = sha256_json([content, [target.label, target.labels, target.number, target.text]])
    return replace(record, group=group, content_hash=whole)
