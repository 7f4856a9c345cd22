"""Class folders → drafts: `owl/1.png` is an owl; also `train/owl/1.png`, and deeper."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from mmlm.corpus.config import FolderSource
from mmlm.corpus.drafts import SPLIT_NAMES, Draft, Outcomes, Refusal, as_label, pick_wording
from mmlm.corpus.records import Part, Record, Target
from mmlm.corpus.sniff import AUDIO_ENDINGS, IMAGE_ENDINGS, TEXT_ENDINGS, sniff
from mmlm.storage import sha256_bytes

MAX_TEXT = 1 << 20
"""Bytes of the longest text file that is read as a record."""
_LEFTOVERS = {"thumbs.db", "desktop.ini", "__macosx", "icon\r", "ehthumbs.db"}


def list_files(folder: Path) -> Iterator[str]:
    """Relative paths of all files below `folder`, sorted; hidden ones and what systems leave behind are skipped."""

    def walk(relative: str) -> Iterator[str]:
        with os.scandir(folder / relative) as found:
            entries = sorted(found, key=lambda e: e.name)
        for entry in entries:
            if entry.name.startswith(".") or entry.name.lower() in _LEFTOVERS:
                continue
            below = f"{relative}/{entry.name}" if relative else entry.name
            if entry.is_dir(follow_symlinks=False):
                yield from walk(below)
            elif entry.is_file():  # a link to a file counts, a link to a folder could run in circles
                yield below

    yield from walk("")


def split_level(files: list[str]) -> bool:
    """Whether the topmost folders are splits: all bear names of splits, train is there, and classes lie below."""
    tops = {f.split("/")[0] for f in files if "/" in f}
    named = {SPLIT_NAMES.get(t.lower(), "") for t in tops}
    return "" not in named and "train" in named and any(f.count("/") >= 2 for f in files)


def read_folders(source: FolderSource, folder: Path, data: str) -> Outcomes:
    """Drafts of every file below `folder`; `group` is left empty, which means the hash of the content."""
    files = list(list_files(folder))
    with_splits = split_level(files)
    prefix = "" if source.path in ("", ".") else source.path.strip("/").removeprefix("./") + "/"
    for relative in files:
        shown = prefix + relative
        if not _storable(shown):
            yield Refusal(ascii(shown), "", "bad_name", "the file's name is not UTF-8")
            continue
        folders = relative.split("/")[:-1]
        split = SPLIT_NAMES[folders.pop(0).lower()] if with_splits and folders else source.split
        if not folders:
            yield Refusal(shown, shown, "no_class", "the file lies in no class folder")
            continue
        part = _part(folder / relative, shown)
        if isinstance(part, Refusal):
            yield part
            continue
        label = as_label("/".join(folders) if source.nested else folders[0])
        parts, lang = [part], ""
        if part.kind != "text":
            wording, lang = pick_wording(source.question, "", int(sha256_bytes(shown.encode())[:8], 16))
            parts.append(Part("text", text=wording))
        record = Record(shown, tuple(parts), source.task, Target(label), split, "", lang, source.path, source.license)
        yield Draft(record, shown)


def _part(path: Path, shown: str) -> Part | Refusal:
    ending = path.suffix.lower()
    if ending in IMAGE_ENDINGS:
        return Part("image", uri=shown)
    if ending in AUDIO_ENDINGS:
        return Part("audio", uri=shown)
    try:
        if ending in TEXT_ENDINGS:
            return _text(path, shown)
        with path.open("rb") as f:
            kind, _ = sniff(f.read(4096))
    except OSError as error:
        return Refusal(shown, shown, "missing_file", error.strerror or str(error))
    if kind == "video":
        return Refusal(shown, shown, "unsupported_kind", "a video; wanted pictures, sounds or texts")
    if not kind:
        return Refusal(shown, shown, "unknown_format", f"{ending or 'no ending'}; wanted pictures, sounds or texts")
    return Part(kind, uri=shown)


def _text(path: Path, shown: str) -> Part | Refusal:
    if path.stat().st_size > MAX_TEXT:
        return Refusal(shown, shown, "too_large", f"a text of more than {MAX_TEXT:,} bytes")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return Refusal(shown, shown, "bad_encoding", f"not UTF-8 at byte {error.start}")
    if not text.strip():
        return Refusal(shown, shown, "no_parts", "an empty text")
    return Part("text", text=text.strip())


def _storable(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
