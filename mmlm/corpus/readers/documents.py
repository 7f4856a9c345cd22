"""Documents → drafts: plain text, Markdown, HTML, WARC and PDF, cut into pieces to be continued.

A piece becomes one record of task `text`: its first sentence (or its heading) is the part that is given, the rest is the
answer; the document's title, or the heading that the piece stands under, is context beside it. So a trainer that learns
answers learns running text. All pieces of a document share a group, which is the hash of its text, so that copies of a
document under other names share it too.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmlm.corpus.config import DocumentsSource
from mmlm.corpus.drafts import SPLIT_NAMES, Draft, Outcomes, Refusal, RefuseError, decode_text, pick_wording, storable
from mmlm.corpus.readers.cutting import cut, head_and_rest, tidied
from mmlm.corpus.readers.document_process import DocumentProcess, require_library
from mmlm.corpus.readers.folders import split_level
from mmlm.corpus.records import Part, Record, Target
from mmlm.storage import sha256_bytes

_MARKDOWN = (".md", ".markdown")
_HTML = (".html", ".htm", ".xhtml")
_WARC = (".warc", ".warc.gz")
_HEADING = re.compile(r"^#{1,6}([ \t].*)$", re.M)
_FENCE = re.compile(r"^(```|~~~)[^\n]*\n.*?^\1", re.M | re.S)
_TITLE = re.compile(r"^title:[ \t]*(.+)$", re.M)
_CHARSET = re.compile(rb"<meta[^>]{0,200}?charset\s*=\s*[\"']?\s*([\w-]{1,40})", re.I)
_KNOWN_CHARSETS = re.compile(
    r"utf-?8|utf-?16(le|be)?|us-ascii|gb-?2312|gbk|gb-?18030|big5(-hkscs)?|shift[_-]jis|sjis|euc-(jp|kr)|iso-2022-jp"
    r"|iso-?8859-?\d{1,2}|latin-?1|windows-125\d|cp125\d|koi8-[ru]|tis-620", re.I,
)  # fmt: skip
MAX_TITLE = 300
"""Characters of the longest title that is kept."""
MAX_LINE = 1 << 16
"""Bytes of the longest line in the head of a WARC record."""
_BOMB = 16
"""A WARC record that says it is this many times longer than the largest document ends the reading of its file."""


@dataclass(frozen=True, slots=True)
class Document:
    """`text` is tidied; `headings` are (offset, heading), in order."""

    where: str
    title: str
    text: str
    headings: tuple[tuple[int, str], ...] = ()


def read_documents(source: DocumentsSource, names: list[str], files: Iterable[tuple[str, Path]]) -> Outcomes:
    """Drafts of the pieces of every document of `files` ((name shown, path)), all of whose names are `names`.

    A document that cannot be read is one Refusal. Raises DataError when a library that is needed is not installed.
    """
    splits = _splits([name for name in names if storable(name)])
    with DocumentProcess() as process:
        for shown, path in files:
            if not storable(shown):
                yield Refusal(ascii(shown), "", "bad_name", "the file's name is not UTF-8")
                continue
            for document in _documents(source, shown, path, process):
                if isinstance(document, Refusal):
                    yield document
                else:
                    yield from pieces_of(source, document, splits.get(shown, source.split))


def _splits(shown: list[str]) -> dict[str, str]:
    """file → split, where the topmost folders that differ are called train, val and test."""
    common = os.path.commonpath([os.path.dirname(s) or "." for s in shown]) if shown else ""
    base = f"{common}/" if common not in ("", ".") else ""
    below = [s.removeprefix(base) for s in shown]
    if not split_level(below, depth=1):
        return {}
    return {s: SPLIT_NAMES[b.split("/")[0].lower()] for s, b in zip(shown, below, strict=True) if "/" in b}


def _documents(
    source: DocumentsSource, shown: str, path: Path, process: DocumentProcess
) -> Iterator[Document | Refusal]:
    name = path.name.lower()
    try:
        if name.endswith(_WARC):
            yield from _warc(source, shown, path, process)
            return
        size = path.stat().st_size
        if size > source.max_bytes:
            raise RefuseError("too_large", f"{size:,} bytes; at most {source.max_bytes:,} are read")
        yield _document(source, shown, name, path.read_bytes(), process)
    except RefuseError as error:
        yield Refusal(shown, shown, error.reason, error.detail)
    except OSError as error:
        yield Refusal(shown, shown, "unreadable_file", error.strerror or str(error))


def _document(
    source: DocumentsSource, shown: str, name: str, data: bytes, process: DocumentProcess, charset: str = ""
) -> Document:
    limits: dict[str, Any] = {
        "pages": source.max_pages, "chars": source.max_bytes, "seconds": source.max_seconds,
    }  # fmt: skip
    if not data:
        raise RefuseError("no_parts", "an empty file")
    if name.endswith(".pdf"):
        if b"%PDF-" not in data[:1024]:
            raise RefuseError("unreadable_document", "no PDF")
        title, text = process.read("pdf", data, **limits)
        return Document(shown, title, tidied(text))
    if name.endswith(_HTML):
        title, text = process.read("html", decode_html(data, charset).encode(), **limits)
        return Document(shown, title, tidied(text))
    if b"\0" in data[:4096] and not data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise RefuseError("unknown_format", "a NUL character: no text")
    text = tidied(decode_text(data))
    if not name.endswith(_MARKDOWN):
        return Document(shown, "", text)
    title = ""
    if text.startswith("---\n") and (end := text.find("\n---\n", 3)) > 0:
        told = _TITLE.search(text[:end])
        title, text = (told[1].strip(" \"'") if told else ""), text[end + 5 :].lstrip("\n")
    fences = [m.span() for m in _FENCE.finditer(text)]
    ends = [end for _, end in fences]
    headings = []
    for offset, heading in headings_of(text):
        at = bisect_right(ends, offset)
        if at == len(fences) or offset < fences[at][0]:
            headings.append((offset, heading))
    return Document(shown, title or (headings[0][1] if headings else ""), text, tuple(headings))


def headings_of(text: str) -> Iterator[tuple[int, str]]:
    """(offset, heading) of each Markdown heading with signs before it, its closing signs left out; code is not told apart."""
    for match in _HEADING.finditer(text):
        told = match[1].lstrip(" \t")
        # what consists of nothing else keeps one character
        heading = told.rstrip(" \t#") or told[:1] or match[1][1:][-1:]
        if heading:
            yield match.start(), heading


def decode_html(data: bytes, charset: str = "") -> str:
    """The characters of a page: by its mark, what the server said, its <meta>, UTF-8, or GB18030 where it looks so.

    Raises RefuseError (bad_encoding).
    """
    if not data.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        told = _CHARSET.search(data[:8192])
        for name in (charset, told[1].decode("ascii", "replace") if told else ""):
            if not _KNOWN_CHARSETS.fullmatch(name):
                continue
            # the web's GB2312 and Latin-1 are in truth these larger sets
            name = re.sub(r"(?i)^gb.*", "gb18030", re.sub(r"(?i)^(iso-?8859-?1|latin-?1|us-ascii)$", "cp1252", name))
            try:
                return data.decode(name)
            except (UnicodeDecodeError, LookupError):
                continue
    return decode_text(data)


def _warc(source: DocumentsSource, shown: str, path: Path, process: DocumentProcess) -> Iterator[Document | Refusal]:
    """Pages of a WARC: answers of status 200 with HTML or plain text in them, and texts already made of pages.

    Other records (requests, metadata, pictures, redirects) are passed over. https://iipc.github.io/warc-specifications/
    """
    require_library("warc")
    from warcio.archiveiterator import ArchiveIterator

    number, last = 0, None
    with path.open("rb") as f:
        records = _with_short_lines(ArchiveIterator(f))
        while True:
            try:
                with contextlib.redirect_stderr(io.StringIO()):  # it prints what it finds odd
                    record = next(records, None)
                if record is None:
                    break
                number, last = number + 1, record
                where = f"{shown}:{number}"
                if (record.length or 0) > _BOMB * source.max_bytes:
                    yield Refusal(where, "", "bomb", f"a record of {record.length:,} bytes; the rest is not read")
                    return
                kind, charset = _content_type(record)
                if not kind:
                    continue
                data = record.content_stream().read(source.max_bytes + 1)
            except Exception as error:  # warcio and zlib raise nearly anything on rubbish
                told = (str(error).strip().splitlines() or [""])[0][:120] or type(error).__name__
                yield Refusal(f"{shown}:{number + 1}", "", "bad_warc", f"{told}; the rest is not read")
                return
            if _is_cut_off(record) and len(data) <= source.max_bytes:
                break
            try:
                if len(data) > source.max_bytes:
                    raise RefuseError("too_large", f"more than {source.max_bytes:,} bytes")
                name = "page.html" if "html" in kind else "page.txt"
                document = _document(source, where, name, data, process, charset)
            except RefuseError as error:
                yield Refusal(where, where, error.reason, error.detail)
            else:
                yield document
    if last is None:
        yield Refusal(shown, "", "bad_warc", "no record in it")
    elif _is_cut_off(last):
        yield Refusal(f"{shown}:{number}", "", "bad_warc", "the file ends within this record")


def _is_cut_off(record: Any) -> bool:
    """Whether bytes of a record that was read to its end are missing."""
    return int(getattr(record.raw_stream, "limit", 0) or 0) > 0


def _with_short_lines(records: Any) -> Any:
    """The iterator of warcio, told to read at most MAX_LINE bytes of a line: it would hold any line whole, and a hundred
    kilobytes of gzip may be a line of a hundred megabytes."""
    read = records.reader.readline
    records.reader.readline = lambda length=None: read(MAX_LINE if length is None else min(length, MAX_LINE))
    return records


def _content_type(record: Any) -> tuple[str, str]:
    """(type, charset) of the page in a WARC record; "" when it is none."""
    if record.rec_type == "response":
        if record.http_headers is None or record.http_headers.get_statuscode() != "200":
            return "", ""
        told = record.http_headers.get_header("Content-Type") or ""
    elif record.rec_type in ("resource", "conversion"):
        told = record.rec_headers.get_header("Content-Type") or ""
    else:
        return "", ""
    kind, _, rest = told.lower().partition(";")
    charset = re.search(r"charset\s*=\s*[\"']?([\w-]+)", rest)
    known = kind.strip() in ("text/html", "application/xhtml+xml", "text/plain")
    return (kind.strip() if known else ""), (charset[1] if charset else "")


def pieces_of(source: DocumentsSource, document: Document, split: str) -> Outcomes:
    """Drafts of the pieces of one document; one Refusal where there is nothing to cut."""
    text, where = document.text, document.where
    try:
        group = sha256_bytes(text.encode())
    except UnicodeEncodeError:
        yield Refusal(where, where, "bad_encoding", "a text with half a surrogate pair in it")
        return
    if len(text.strip()) < source.min_chars:
        yield Refusal(where, where, "too_short", f"{len(text.strip())} characters; wanted {source.min_chars} or more")
        return
    offsets = [offset for offset, _ in document.headings]
    number = int(group[:8], 16)
    wording, asked_in = pick_wording(source.question, source.lang, number)
    for count, (offset, piece) in enumerate(cut(text, source.max_chars, source.min_chars, source.overlap), 1):
        name = f"{where}#{count:04d}"
        head, rest = head_and_rest(piece)
        if not head or not rest:
            yield Refusal(where, name, "too_short", "a piece of one character")
            continue
        at = bisect_right(offsets, offset) - 1
        title = (document.headings[at][1] if at >= 0 else document.title).strip()[:MAX_TITLE]
        parts = [Part("text", "context", title)] if source.title and title and title not in head else []
        parts += [Part("text", text=t) for t in (wording, head) if t]
        record = Record(
            name, tuple(parts), source.task, Target(text=rest), split, group, source.lang or (asked_in if wording else ""),
            _source_of(where), source.license,
        )  # fmt: skip
        yield Draft(record, name)


def _source_of(where: str) -> str:
    """What counts as the source of a document: the archive that it is in, else its folder. The id names the document."""
    archive = re.fullmatch(r"(.+\.warc(?:\.gz)?):\d+", where)
    return archive[1] if archive else os.path.dirname(where) or "."
