"""Class folders → drafts: `owl/1.png` is an owl; also `train/owl/1.png`, and deeper."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from mmlm import remote
from mmlm.corpus.config import FolderSource
from mmlm.corpus.drafts import (
    SPLIT_NAMES,
    Draft,
    Outcomes,
    Refusal,
    RefuseError,
    as_label,
    decode_text,
    pick_wording,
    storable,
)
from mmlm.corpus.readers.links import Bad, Links, Trail, is_left_over
from mmlm.corpus.records import Part, Record, Target
from mmlm.corpus.sniff import AUDIO_ENDINGS, IMAGE_ENDINGS, TEXT_ENDINGS, VIDEO_ENDINGS, sniff
from mmlm.storage import is_remote, sha256_bytes

MAX_TEXT = 1 << 20
"""Bytes of the longest text file that is read as a record."""
_ENDINGS = {"image": IMAGE_ENDINGS, "audio": AUDIO_ENDINGS, "text": TEXT_ENDINGS, "video": VIDEO_ENDINGS}


def list_files(folder: Path, within: Path | None = None, bad: Bad | None = None) -> Iterator[str]:
    """Relative paths of all files below `folder`, sorted; hidden ones and what systems leave behind are skipped.

    Links are followed as `Links` says.
    """
    links = Links(folder, within, bad)

    def walk(relative: str, trail: Trail) -> Iterator[str]:
        for name, inner in links.entries(relative, trail):
            below = f"{relative}/{name}" if relative else name
            if inner:
                yield from walk(below, inner)
            else:
                yield below

    yield from walk("", links.trail)


class Tree:
    """The files below a folder: one of this machine, or one that lies elsewhere, whose files are fetched when opened.

    `path` is what the source says, `prefix` what stands before relative paths in ids and URIs. `root` is the address
    that all paths are relative to, where the whole corpus lies elsewhere. Links may lead to any folder in `within`; without
    it, in the folder itself.
    """

    def __init__(self, path: str, folder: Path, root: str = "", within: Path | None = None) -> None:
        self.folder, self.within = folder, within
        inside = "" if path in ("", ".") else path.strip("/").removeprefix("./") + "/"
        self.uri = path.rstrip("/") if is_remote(path) else f"{root.rstrip('/')}/{inside}".rstrip("/") if root else ""
        self.prefix = f"{self.uri}/" if is_remote(path) else inside

    def files(self, bad: list[Refusal] | None = None) -> Iterator[str]:
        """Relative paths of all files, sorted folder by folder. Links that are not followed are added to `bad`."""
        if not self.uri:
            yield from list_files(self.folder, self.within, self._teller(bad))
            return
        for uri in remote.below(self.uri + "/"):
            relative = uri.removeprefix(self.uri + "/")
            if not any(is_left_over(name) for name in relative.split("/")):
                yield relative

    def folders(self, bad: list[Refusal] | None = None) -> Iterator[tuple[str, list[str]]]:
        """(relative path, sorted names of its files) of every folder that holds files. `bad`: see `files`."""
        if not self.uri:
            yield from walk_folders(self.folder, self.within, self._teller(bad))
            return
        found: dict[str, list[str]] = {}
        for relative in self.files():
            folder, _, name = relative.rpartition("/")
            found.setdefault(folder, []).append(name)
        yield from ((folder, sorted(found[folder])) for folder in sorted(found))

    def _teller(self, bad: list[Refusal] | None) -> Bad:
        def told(refusal: Refusal) -> None:
            if bad is not None:
                shown = self.prefix + refusal.id
                shown = shown if storable(shown) else ascii(shown)
                bad.append(replace(refusal, source=shown, id=shown))

        return told

    def open(self, relative: str) -> Path:
        """The file on this machine. Raises DataError when it lies elsewhere and cannot be fetched."""
        return remote.fetch(f"{self.uri}/{relative}") if self.uri else self.folder / relative


def walk_folders(folder: Path, within: Path | None = None, bad: Bad | None = None) -> Iterator[tuple[str, list[str]]]:
    """(relative path, sorted names of its files) of `folder` and of every folder below it that holds files."""
    links = Links(folder, within, bad)

    def walk(relative: str, trail: Trail) -> Iterator[tuple[str, list[str]]]:
        entries = links.entries(relative, trail)
        folders = [(name, inner) for name, inner in entries if inner]
        if names := [name for name, inner in entries if not inner]:
            yield relative, names
        del entries
        for name, inner in folders:
            yield from walk(f"{relative}/{name}" if relative else name, inner)

    yield from walk("", links.trail)


def split_level(files: Iterable[str], depth: int = 2) -> bool:
    """Whether the topmost folders are splits: all bear names of splits, train is there, and something lies `depth`
    folders deep (2: classes lie below). With classes, other folders may lie beside them (`unlabeled`), where train has
    two classes or more, and another split is there or no other folder has folders in it."""
    classes: dict[str, set[str]] = {}
    others = nested = deep = False
    for file in files:
        if "/" not in file:
            continue
        top, *below = file.split("/")[:-1]
        split = SPLIT_NAMES.get(top.lower(), "")
        if split:
            classes.setdefault(split, set()).update(below[:1])
            deep = deep or 1 + len(below) >= depth
        elif depth < 2:
            return False
        else:
            others, nested = True, nested or bool(below)
    if others:
        return len(classes.get("train", ())) > 1 and (len(classes) > 1 or not nested)
    return "train" in classes and deep


def read_folders(source: FolderSource, tree: Tree) -> Outcomes:
    """Drafts of every file of `tree`; `group` is left empty, which means the hash of the content."""
    with_splits = split_level(tree.files())
    links: list[Refusal] = []
    for relative in tree.files(links):  # listed twice instead of being held in memory
        shown = tree.prefix + relative
        if not storable(shown):
            yield Refusal(ascii(shown), "", "bad_name", "the file's name is not UTF-8")
            continue
        folders = relative.split("/")[:-1]
        if with_splits and folders and folders[0].lower() not in SPLIT_NAMES:
            yield Refusal(shown, shown, "no_split", f"{folders[0]!r} lies beside the splits and is none of them")
            continue
        split = SPLIT_NAMES[folders.pop(0).lower()] if with_splits and folders else source.split
        if not folders:
            yield Refusal(shown, shown, "no_class", "the file lies in no class folder")
            continue
        part = _part(tree, relative)
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
    yield from links


def kind_of(tree: Tree, relative: str) -> str | Refusal:
    """image, audio, video or text, by the file's ending, else by its first bytes; a Refusal when it is none of them."""
    shown, ending = tree.prefix + relative, os.path.splitext(relative)[1].lower()
    for kind, endings in _ENDINGS.items():
        if ending in endings:
            return kind
    try:
        with tree.open(relative).open("rb") as f:
            kind, _ = sniff(f.read(4096))
    except OSError as error:
        return Refusal(shown, shown, "missing_file", error.strerror or str(error))
    wanted = "pictures, sounds, videos or texts"
    return kind or Refusal(shown, shown, "unknown_format", f"{ending or 'no ending'}; wanted {wanted}")


def _part(tree: Tree, relative: str) -> Part | Refusal:
    shown, kind = tree.prefix + relative, kind_of(tree, relative)
    if kind == "text":
        try:
            return _text(tree.open(relative), shown)
        except OSError as error:
            return Refusal(shown, shown, "missing_file", error.strerror or str(error))
    return kind if isinstance(kind, Refusal) else Part(kind, uri=shown)


def _text(path: Path, shown: str) -> Part | Refusal:
    if path.stat().st_size > MAX_TEXT:
        return Refusal(shown, shown, "too_large", f"a text of more than {MAX_TEXT:,} bytes")
    try:
        text = decode_text(path.read_bytes())
    except RefuseError as error:
        return Refusal(shown, shown, error.reason, error.detail)
    if not text.strip():
        return Refusal(shown, shown, "no_parts", "an empty text")
    return Part("text", text=text.strip())
