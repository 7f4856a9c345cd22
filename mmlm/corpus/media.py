"""The media of drafts, read once each: hash of the bytes and what the header says, in a few threads.

Here also a long sound becomes several records (`pieces` of its source), since its length stands in its header.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from mmlm.corpus.config import PiecesConfig
from mmlm.corpus.drafts import Draft, Refusal, RefuseError
from mmlm.corpus.records import Part, Record
from mmlm.corpus.sniff import Header, read_header
from mmlm.errors import DataError
from mmlm.storage import MAX_FILE_BYTES, is_remote, read_uri, resolve, sha256_bytes, sha256_json, split_fragment
from mmlm.stores import blank

CACHED = 100_000
"""Media files whose hash and header are remembered, so that a file that many records use is read once."""
BATCH = 512
BATCH_BYTES = 64 << 20
"""Bytes of inline media from which on a batch is full."""
CHUNK = 32
"""Files that one thread takes at a time; one by one, handing them over costs more than reading them."""
LARGE = 32 << 20
"""Bytes from which on a local file is hashed piece by piece instead of being held in memory."""
MAX_URI = 4096
"""Characters of the longest address of a medium, as many as a path may have; what is longer is content, or rubbish."""
MAX_PIECES = 10_000
"""Pieces of the longest sound that is cut; more than that is a header that lies."""

Span = tuple[float, float]
"""From and to, in seconds."""


class Seen(NamedTuple):
    """What a media file is: hash and size of its bytes, and what its header says."""

    sha256: str
    size: int
    header: Header


@dataclass(frozen=True, slots=True)
class Looked:
    """A draft after its media were looked at. `headers` are those of its media parts, `media` the hashes of their files;
    `dropped` what was left out."""

    record: Record
    where: str
    headers: tuple[Header, ...]
    dropped: tuple[Refusal, ...] = ()
    media: tuple[str, ...] = ()


class MediaReader:
    """Looks at the media of drafts. `drop`: keep a record without its broken parts as long as others are left.

    `video`: whether videos are taken.
    """

    def __init__(self, data: Path | str, *, drop: bool, allow_remote: bool, threads: int, video: bool = True) -> None:
        self.data, self.drop, self.allow_remote, self.threads, self.video = data, drop, allow_remote, threads, video
        self.known: OrderedDict[tuple[str, str], Seen | RefuseError] = OrderedDict()
        self.trusted: tuple[str, ...] = ()

    def look(self, outcomes: Iterable[Draft | Refusal]) -> Iterator[Looked | Refusal]:
        """The outcomes in order; drafts with their content hash (several where a long sound is cut), or a Refusal
        naming the broken part."""
        stream = iter(outcomes)
        # another source may trust other places
        self.known = OrderedDict((key, found) for key, found in self.known.items() if not is_remote(key[1]))
        with ThreadPoolExecutor(self.threads) as pool:
            while batch := _batch(stream):
                parts: dict[tuple[str, str], None] = {}
                for outcome in batch:
                    if isinstance(outcome, Draft):
                        self.trusted = outcome.trusted
                        parts |= {_key(p): None for p in outcome.record.parts if p.uri is not None}
                todo = [key for key in parts if key not in self.known]
                chunks = [todo[at : at + CHUNK] for at in range(0, len(todo), CHUNK)]
                for chunk, found in zip(chunks, pool.map(self._read_all, chunks), strict=True):
                    self.known |= zip(chunk, found, strict=True)
                for one in batch:
                    if isinstance(one, Refusal):
                        yield one
                    else:
                        yield from self._finish(one)
                while len(self.known) > CACHED:
                    self.known.popitem(last=False)

    def _read_all(self, keys: list[tuple[str, str]]) -> list[Seen | RefuseError]:
        return [self._read(key) for key in keys]

    def _read(self, key: tuple[str, str]) -> Seen | RefuseError:
        kind, uri = key
        try:
            if len(uri) > MAX_URI:
                raise RefuseError(
                    "missing_file", f"an address of {len(uri):,} characters; at most {MAX_URI:,} are looked up"
                )
            if kind == "video" and not self.video:
                raise RefuseError("unsupported_kind", "a video, and allow_video is false")
            if is_remote(uri) and not self.allow_remote and (not uri.startswith(self.trusted) or "/../" in uri):
                raise RefuseError("remote_uri", "it lies elsewhere; fetch it, or set allow_remote: true")
            return self._local_large(kind, uri) or self._header(kind, self._bytes(uri))
        except RefuseError as error:
            return RefuseError(error.reason, f"{blank(uri[:MAX_URI])}: {error.detail}")

    def _bytes(self, uri: str) -> bytes:
        try:
            return read_uri(uri, self.data)
        except DataError as error:
            bare = split_fragment(uri)[0]
            missing = not is_remote(bare) and not os.path.exists(resolve(bare, self.data))
            raise RefuseError("missing_file" if missing else "unreadable_file", str(error)) from None
        except OSError as error:
            raise RefuseError("unreadable_file", error.strerror or str(error)) from None

    def _local_large(self, kind: str, uri: str) -> Seen | None:
        """Hash and header of a large local file (or a large member of a local tar) that is never held whole."""
        bare, _, within = split_fragment(uri)
        if is_remote(bare):
            return None
        try:
            path = resolve(bare, self.data)
            found = os.stat(path)
            offset, size = within or (0, found.st_size)
            if not LARGE < size <= MAX_FILE_BYTES or offset + size > found.st_size or not stat.S_ISREG(found.st_mode):
                return None
            with open(path, "rb") as f:
                window = io.BufferedReader(_Window(f, offset, size), 1 << 20)
                header = read_header(cast(BinaryIO, window), kind)
                window.seek(0)
                return Seen(hashlib.file_digest(window, "sha256").hexdigest(), size, header)
        except (OSError, ValueError, DataError):
            return None  # the usual way says what is wrong

    @staticmethod
    def _header(kind: str, data: bytes) -> Seen:
        return Seen(sha256_bytes(data), len(data), read_header(data, kind))

    def _finish(self, draft: Draft) -> Iterator[Looked | Refusal]:
        record = draft.record
        kept: list[Part] = []
        hashes: list[str] = []
        headers: list[Header] = []
        dropped: list[Refusal] = []
        for part in record.parts:
            if part.kind not in ("image", "audio", "video"):
                kept.append(part)
                continue
            found = self._looked(part)
            if not isinstance(found, RefuseError):
                kept.append(part if part.uri is None else replace(part, size=found.size, sha256=found.sha256))
                hashes.append(found.sha256)
                headers.append(found.header)
            elif self.drop:
                dropped.append(Refusal(draft.where, record.id, found.reason, found.detail))
            else:
                yield Refusal(draft.where, record.id, found.reason, found.detail)
                return
        if dropped and not any(p.modality != "text" for p in kept):
            yield dropped[0]
            return
        record = replace(record, parts=tuple(kept))
        try:
            # before it is cut, so that all pieces share the group
            record = replace(record, group=record.group or _group(record, hashes))
            for piece, header, name in _cut(record, headers, draft.pieces):
                yield Looked(_hashed(piece, hashes, name), draft.where, tuple(header), tuple(dropped), tuple(hashes))
                dropped = []  # counted once
        except UnicodeEncodeError:
            name = record.id.encode("utf-8", "backslashreplace").decode()
            yield Refusal(draft.where, name, "bad_encoding", "a text with half a surrogate pair in it")
        except RefuseError as error:
            yield Refusal(draft.where, record.id, error.reason, error.detail)

    def _looked(self, part: Part) -> Seen | RefuseError:
        """Hash of the whole file and the header of what the part takes of it."""
        found = self._inline(part) if part.uri is None else self.known[_key(part)]
        span = split_fragment(part.uri)[1] if part.uri else None
        if span is None or isinstance(found, RefuseError):
            return found
        header = found.header
        if header.kind == "image":
            return RefuseError("bad_span", f"{part.uri}: a span of seconds of a picture")
        end = min(span[1], header.seconds) if header.kind == "audio" else span[1]
        if span[0] >= end:
            return RefuseError("bad_span", f"{part.uri}: a sound of {header.seconds:.3f} s has nothing there")
        return found._replace(header=replace(header, seconds=end - span[0]))

    def _inline(self, part: Part) -> Seen | RefuseError:
        if part.kind == "video" and not self.video:
            return RefuseError("unsupported_kind", "a video, and allow_video is false")
        try:
            return self._header(part.kind, part.data or b"")
        except RefuseError as error:
            return RefuseError(error.reason, f"inline {part.kind}: {error.detail}")


def _batch(stream: Iterator[Draft | Refusal]) -> list[Draft | Refusal]:
    """The next outcomes: at most BATCH, and few where they carry their media in them."""
    batch: list[Draft | Refusal] = []
    size = 0
    for outcome in stream:
        batch.append(outcome)
        if isinstance(outcome, Draft):
            size += sum(len(p.data) for p in outcome.record.parts if p.data)
        if len(batch) == BATCH or size > BATCH_BYTES:
            break
    return batch


class _Window(io.RawIOBase):
    """`size` bytes of an open file, from `offset` on, as a file of their own."""

    def __init__(self, file: BinaryIO, offset: int, size: int) -> None:
        self.file, self.offset, self.size, self.at = file, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = max(0, offset + (0, self.at, self.size)[whence])
        return self.at

    def tell(self) -> int:
        return self.at

    def readinto(self, buffer: Any) -> int:
        self.file.seek(self.offset + self.at)
        data = self.file.read(max(0, min(len(buffer), self.size - self.at)))
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)


def spans(seconds: float, pieces: PiecesConfig) -> list[Span]:
    """Where a sound of `seconds` is cut; one span of all of it when it is not longer than a piece.

    Raises RefuseError (too_long) when there would be more than MAX_PIECES.
    """
    step = pieces.seconds - pieces.overlap
    if seconds / step > MAX_PIECES:
        raise RefuseError("too_long", f"a sound of {seconds:,.0f} s makes more than {MAX_PIECES:,} pieces")
    found, number = [(0.0, min(seconds, pieces.seconds))], 1
    while found[-1][1] < seconds:
        start = number * step
        if min(seconds - start, pieces.seconds) < min(pieces.min_seconds, pieces.seconds):
            break
        found.append((start, min(start + pieces.seconds, seconds)))
        number += 1
    return found


def _cut(
    record: Record, headers: list[Header], pieces: PiecesConfig | None
) -> Iterator[tuple[Record, list[Header], str]]:
    """The record itself, or its pieces when exactly one sound of it is whole and longer than a piece; with their
    headers and what the piece is called."""
    media = [p for p in record.parts if p.kind in ("image", "audio", "video")]
    sounds = [i for i, p in enumerate(media) if p.kind == "audio"]
    if pieces is None or len(sounds) != 1 or headers[sounds[0]].seconds <= pieces.seconds:
        yield record, headers, ""
        return
    at, part = sounds[0], media[sounds[0]]
    given = split_fragment(part.uri)[1] if part.uri else None
    if given is not None:  # the data have cut it already
        yield record, headers, ""
        return
    for start, end in spans(headers[at].seconds, pieces):
        name = f"#t={_seconds(start)},{_seconds(end)}"
        piece = (
            replace(part, uri=part.uri + name)
            if part.uri
            else replace(part, data=_cut_out(part.data or b"", start, end))
        )
        parts = tuple(piece if p is part else p for p in record.parts)
        header = replace(headers[at], seconds=end - start)
        yield replace(record, id=record.id + name, parts=parts), [*headers[:at], header, *headers[at + 1 :]], name


def _cut_out(data: bytes, start: float, end: float) -> bytes:
    """Seconds `start` to `end` of a sound held in memory, as a WAV of the same rate (16 bits unless it had more)."""
    import soundfile

    from mmlm.sound_file import open_sound

    held = io.BytesIO()
    try:
        with open_sound(io.BytesIO(data)) as sound:
            kind = sound.subtype if sound.subtype in ("PCM_24", "PCM_32", "FLOAT", "DOUBLE") else "PCM_16"
            sound.seek(round(start * sound.samplerate))
            read = {"PCM_16": "int16", "PCM_24": "int32", "PCM_32": "int32"}.get(kind, "float64")
            samples = sound.read(round(end * sound.samplerate) - sound.tell(), dtype=read)
            soundfile.write(held, samples, sound.samplerate, format="WAV", subtype=kind)
    except Exception as error:  # libsndfile's message is of use, its type is not
        raise RefuseError("unreadable_audio", f"cutting it: {str(error).rsplit(': ', 1)[-1][:100]}") from None
    return held.getvalue()


def _seconds(value: float) -> str:
    """Seconds to the millisecond, as short as can be: `30`, `62.5`."""
    return f"{value:.3f}".rstrip("0").rstrip(".")


def _key(part: Part) -> tuple[str, str]:
    """What is read for a part: all of its file, whichever seconds of it the part takes."""
    assert part.uri is not None
    return part.kind, part.uri.rpartition("#t=")[0] if split_fragment(part.uri)[1] else part.uri


def _content(record: Record, media: list[str]) -> list[list[Any]]:
    """The parts as JSON values; `media` are the hashes of the files, in order."""
    hashes = iter(media)
    return [
        [
            p.kind, p.role, p.text if p.kind == "text" else p.fields if p.kind == "fields" else next(hashes),
            *([p.turn] if p.turn else []),
        ]
        for p in record.parts
    ]  # fmt: skip


def _group(record: Record, media: list[str]) -> str:
    return sha256_json(sorted(media) if media else _content(record, media))


def _hashed(record: Record, media: list[str], cut: str = "") -> Record:
    """The record with its content hash; `cut` says which piece it is. Raises UnicodeEncodeError when a text of it
    cannot be stored."""
    content, target = _content(record, media), record.target
    cuts = [p.uri.rpartition("#t=")[2] for p in record.parts if p.uri and split_fragment(p.uri)[1]] or [
        cut.removeprefix("#t=")
    ]
    names = (record.id, record.task, record.split, record.group, record.lang, record.source, record.license)
    "".join(names).encode()  # a manifest holds UTF-8; the content is tried by its hash
    whole = [content, [target.label, target.labels, target.number, target.text], *([cuts] if any(cuts) else [])]
    return replace(record, content_hash=sha256_json(whole))
