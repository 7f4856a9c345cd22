"""A story's sources, opened: which files they name, and their drafts."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path

from mmlm import remote
from mmlm.config import blank_credentials, unsigned
from mmlm.corpus.config import (
    CAPTION,
    ChatSource,
    DocumentsSource,
    FolderSource,
    HfSource,
    KeypadSource,
    SidecarSource,
    Source,
    TableSource,
    WebDatasetSource,
)
from mmlm.corpus.drafts import Draft, Outcomes, Refusal
from mmlm.corpus.elsewhere import laid_out
from mmlm.corpus.keypad import FOLDER as KEYPAD_FOLDER
from mmlm.corpus.keypad import TABLE as KEYPAD_TABLE
from mmlm.corpus.readers.chat import read_chat
from mmlm.corpus.readers.folders import Tree, list_files, read_folders
from mmlm.corpus.readers.hf import Need, hf_files, read_hf
from mmlm.corpus.readers.hf_columns import TRANSCRIBE
from mmlm.corpus.readers.sidecar import read_sidecar
from mmlm.corpus.readers.table import read_table
from mmlm.corpus.readers.webdataset import read_webdataset
from mmlm.errors import DataError
from mmlm.storage import is_remote, resolve

MAX_FILES = 1_000_000
"""Names that one pattern with braces may stand for."""
_FETCH = "--data must point to the folder that the corpus was fetched into"
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}")
_FOLDER_HOLDS = {
    "table": (".parquet",), "webdataset": (".tar",),
    "documents": (".txt", ".md", ".markdown", ".html", ".htm", ".xhtml", ".warc", ".warc.gz", ".pdf"),
}  # fmt: skip
"""Which files a folder stands for where `files` names one."""


def files_of(source: Source, data: Path | str) -> list[tuple[str, Path]]:
    """(path relative to `data`, absolute path) of the files that a source names, sorted.

    For class folders and side-cars these are the records' own files, for tables the tables. What lies elsewhere
    (`s3://bucket/t.jsonl`) stands under its URI, not yet fetched, and has no path: `Path()`. So it is with everything
    where `data` itself is an address, under names relative to that. Raises DataError when there are none.
    """
    if isinstance(source, KeypadSource):
        return []
    patterns = [source.path] if isinstance(source, FolderSource | SidecarSource | HfSource) else source.files
    if isinstance(data, str):
        return _files_elsewhere(source, data, patterns)
    if not data.is_dir() and not all(map(is_remote, patterns)):
        raise DataError(f"there is no folder {data}", wanted="the raw corpora", cure=_FETCH)
    if isinstance(source, FolderSource | SidecarSource | HfSource):
        folder = _folder(source, data)
        tree = Tree(source.path, folder, within=data)
        if tree.uri:
            return [(name, Path()) for name in _names_elsewhere(source, tree, data)]
        names = [f for _, f in hf_files(source, folder)] if isinstance(source, HfSource) else tree.files()
        return [(os.path.normpath(f"{source.path}/{f}"), folder / f) for f in names]
    found: dict[str, Path] = {}
    for pattern in patterns:
        if is_remote(pattern):
            found |= dict.fromkeys(_elsewhere(source, pattern), Path())
            continue
        _below(data, pattern)
        here = {name: data / name for one in expand_braces(pattern) for name in _matching(source, data, one)}
        if not here:
            raise DataError(f"there is no file {data / pattern}", wanted=f"a {source.kind} corpus", cure=_FETCH)
        found |= here
    return sorted(found.items())


def expand_braces(pattern: str) -> Iterator[str]:
    """`a-{000..012}.tar` and `{train,val}/x.csv` → the names they stand for.

    Raises DataError when there are more than MAX_FILES.
    """
    match = _BRACES.search(pattern)
    if not match:
        yield pattern
        return
    if match[3] is not None:
        options = match[3].split(",")
    else:
        low, high = int(match[1]), int(match[2])
        width = len(match[1]) if match[1].startswith("0") or len(match[1]) == len(match[2]) else 0
        if high - low >= MAX_FILES:
            raise DataError(f"{match[0]} stands for {high - low + 1:,} names", wanted=f"at most {MAX_FILES:,}")
        options = [f"{number:0{width}d}" for number in range(low, high + 1)]
    for option in options:
        yield from expand_braces(pattern[: match.start()] + option + pattern[match.end() :])


def opened(files: list[tuple[str, Path]], data: Path | str) -> Iterator[tuple[str, Path]]:
    """The files in order; those that lie elsewhere are fetched one by one, when their turn comes."""
    for name, path in files:
        where = resolve(name, data) if isinstance(data, str) else name
        yield name, remote.fetch(where) if is_remote(where) else path


def _shown(files: Iterator[tuple[str, Path]]) -> Iterator[tuple[str, Path]]:
    """The same under names without signatures, since they go into ids and reports."""
    return ((unsigned(name), path) for name, path in files)


def _files_elsewhere(source: Source, data: str, patterns: list[str]) -> list[tuple[str, Path]]:
    """`files_of` below an address."""
    if isinstance(source, FolderSource | SidecarSource | HfSource):
        tree = _tree(source, data)
        found = _names_elsewhere(source, tree, data)
        if not found:
            raise DataError(f"there is nothing at {blank_credentials(tree.uri)}", wanted=f"a {source.kind} corpus")
        return [(name, Path()) for name in found]
    names: set[str] = set()
    for pattern in patterns:
        if not is_remote(pattern):
            _below(Path(), pattern)
        root = data.rstrip("/") + "/"
        whole = pattern if is_remote(pattern) else _address(source, root, pattern)
        names |= {uri.removeprefix(root) for uri in _elsewhere(source, whole)}
    return [(name, Path()) for name in sorted(names)]


def _names_elsewhere(source: FolderSource | SidecarSource | HfSource, tree: Tree, data: Path | str) -> list[str]:
    """The files of a folder at an address; of a saved data set those that hold its rows."""
    if not isinstance(source, HfSource):
        return [tree.prefix + name for name in tree.files()]
    with data_set(source, data) as (folder, _):
        return [tree.prefix + name for _, name in hf_files(source, folder)]


def _address(source: Source, root: str, pattern: str) -> str:
    """The address of a pattern below `root`. A store has no folders: one is known by its slash, or by having no ending."""
    path = os.path.normpath(pattern)
    folder = pattern.endswith("/") or (source.kind in _FOLDER_HOLDS and not os.path.splitext(path)[1])
    return root if path == "." else root + path + "/" * (folder and not glob.has_magic(path))


def _elsewhere(source: Source, pattern: str) -> list[str]:
    """Objects that a remote pattern stands for; ending in `/`, all below it that such a source reads."""
    found = [uri for one in expand_braces(pattern) for uri in remote.expand(one)]
    if pattern.endswith("/"):
        endings = _FOLDER_HOLDS.get(source.kind, ())
        found = [uri for uri in found if uri.lower().endswith(endings)]
    if not found:
        raise DataError(f"there is nothing at {blank_credentials(unsigned(pattern))}", wanted=f"a {source.kind} corpus")
    return found


def _trusted(source: Source) -> tuple[str, ...]:
    """Beginnings of remote URIs that the source's own config names: the folders of its patterns, and its root."""
    named = [*getattr(source, "files", []), *(f"{getattr(source, key, '')}/" for key in ("root", "path"))]
    return tuple(re.split(r"[*?\[{]", n)[0].rpartition("/")[0] + "/" for n in named if is_remote(n))


def _matching(source: Source, data: Path, pattern: str) -> Iterator[str]:
    """Files that a pattern names, or those below a folder that it names. Raises DataError when a plain name is missing."""
    names = glob.glob(pattern, root_dir=data, recursive=True) if glob.has_magic(pattern) else [pattern]
    for name in names:
        if (data / name).is_file():
            yield os.path.normpath(name)
        elif (data / name).is_dir() and not glob.has_magic(pattern):
            endings = _FOLDER_HOLDS.get(source.kind, ())
            for below in list_files(data / name, data):
                if below.lower().endswith(endings):
                    yield os.path.normpath(f"{name}/{below}")
        elif not glob.has_magic(pattern):
            raise DataError(f"there is no file {data / name}", wanted=f"a {source.kind} corpus", cure=_FETCH)


def read_source(source: Source, data: Path | str, repeats: dict[int, int] | None = None) -> Outcomes:
    """All drafts and refusals of a source, in the order of its sorted files.

    `repeats`: how often each row without an id was seen. Where several sources are read, they share it, so that a row
    that two of them hold is two records.
    """
    pieces = None if isinstance(source, KeypadSource | DocumentsSource) else source.pieces
    trusted = _trusted(source)
    for outcome in _read(source, data, repeats):
        if isinstance(outcome, Draft) and (pieces or trusted):
            yield replace(outcome, pieces=pieces, trusted=trusted)
        else:
            yield outcome


def _read(source: Source, data: Path | str, repeats: dict[int, int] | None) -> Outcomes:
    absolute = data if isinstance(data, str) else os.path.abspath(data)
    if isinstance(source, FolderSource):
        return read_folders(source, _tree(source, data))
    if isinstance(source, SidecarSource):
        return read_sidecar(source, _tree(source, data))
    if isinstance(source, HfSource):
        return _read_hf(source, data, absolute, repeats)
    if isinstance(source, TableSource):
        return read_table(source, _shown(opened(files_of(source, data), data)), absolute, repeats)
    if isinstance(source, WebDatasetSource):
        return read_webdataset(source, opened(files_of(source, data), data), absolute, repeats)
    if isinstance(source, DocumentsSource):
        from mmlm.corpus.readers.documents import read_documents

        files = files_of(source, data)
        documents = read_documents(source, [unsigned(name) for name, _ in files], _shown(opened(files, data)))
        return chain(documents, _bad_links(source, data))
    if isinstance(source, KeypadSource):
        if isinstance(data, str):
            raise DataError(
                f"the keypad corpus is made, and {blank_credentials(data)} is elsewhere", cure="leave --data out"
            )
        name = f"{KEYPAD_FOLDER}/{KEYPAD_TABLE}"
        chat = ChatSource(kind="chat", files=[name], root=KEYPAD_FOLDER)
        return read_chat(chat, [(name, data / name)], absolute)
    return read_chat(source, _shown(opened(files_of(source, data), data)), absolute, repeats)


def _read_hf(source: HfSource, data: Path | str, absolute: str, repeats: dict[int, int] | None) -> Outcomes:
    with data_set(source, data) as (folder, need):
        yield from read_hf(source, folder, absolute, need, repeats)


@contextmanager
def data_set(source: HfSource, data: Path | str) -> Iterator[tuple[Path, Need]]:
    """The folder of a saved data set, and what gives a file of it with its content. Of one that lies elsewhere the folder
    holds the names, and each file is fetched once, when its turn comes."""
    folder = _folder(source, data)
    uri = Tree(source.path, folder, data if isinstance(data, str) else "").uri
    if not uri:
        yield folder, lambda path: path
        return
    with laid_out(uri) as place:
        yield place.folder, lambda path: remote.fetch(place.address(path))


def _tree(source: FolderSource | SidecarSource | HfSource, data: Path | str) -> Tree:
    folder = _folder(source, data)
    return Tree(source.path, folder, data) if isinstance(data, str) else Tree(source.path, folder, within=data)


def _bad_links(source: Source, data: Path | str) -> list[Refusal]:
    """The links below the folders that a source's `files` name, which lead elsewhere or nowhere."""
    found: list[Refusal] = []
    for pattern in getattr(source, "files", []) if isinstance(data, Path) else []:
        if not is_remote(pattern) and (Path(data) / pattern).is_dir():
            for _ in Tree(pattern, Path(data) / pattern, within=Path(data)).files(found):
                pass  # only what is found on the way is wanted
    return found


def _folder(source: FolderSource | SidecarSource | HfSource, data: Path | str) -> Path:
    """The folder that the source names, made sure of; `Path()` when it lies elsewhere."""
    if isinstance(data, str) and not is_remote(source.path):
        _below(Path(), source.path)
    if is_remote(source.path) or isinstance(data, str):
        return Path()
    folder = _below(data, source.path)
    if not folder.is_dir():
        wanted = {"folders": "a folder per class", "sidecar": "a folder of files side by side"}
        raise DataError(f"there is no folder {folder}", wanted=wanted.get(source.kind, "a data set"), cure=_FETCH)
    return folder


def _below(data: Path, path: str) -> Path:
    if os.path.isabs(path) or ".." in Path(path).parts:
        raise DataError(f"the source path {path!r} leaves the data folder", cure="give a path below --data")
    return data / path


def wordings(sources: Iterable[Source]) -> frozenset[str]:
    """The questions that the config itself puts to records, in all languages; those with holes are left out."""
    found: set[str] = set(CAPTION.values()) | set(TRANSCRIBE.values())
    for source in sources:
        asked = [getattr(source, "question", ""), *(ask.question for ask in getattr(source, "ask", []))]
        for question in asked:
            found.update(question.values() if isinstance(question, dict) else [question])
    return frozenset(text for text in found if text and "{" not in text)
