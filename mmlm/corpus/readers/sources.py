"""A story's sources, opened: which files they name, and their drafts."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from mmlm.corpus.config import ChatSource, FolderSource, KeypadSource, Source, TableSource
from mmlm.corpus.drafts import Outcomes
from mmlm.corpus.keypad import FOLDER as KEYPAD_FOLDER
from mmlm.corpus.keypad import TABLE as KEYPAD_TABLE
from mmlm.corpus.readers.chat import read_chat
from mmlm.corpus.readers.folders import list_files, read_folders
from mmlm.corpus.readers.table import read_table
from mmlm.errors import DataError

_FETCH = "--data must point to the folder that the corpus was fetched into"


def files_of(source: Source, data: Path) -> list[tuple[str, Path]]:
    """(path relative to `data`, absolute path) of the files that a source names, sorted.

    For class folders these are the records' own files, for tables the tables. Raises DataError when there are none.
    """
    if isinstance(source, KeypadSource):
        return []
    if not data.is_dir():
        raise DataError(f"there is no folder {data}", wanted="the raw corpora", cure=_FETCH)
    if isinstance(source, FolderSource):
        folder = _below(data, source.path)
        if not folder.is_dir():
            raise DataError(f"there is no folder {folder}", wanted="a folder per class", cure=_FETCH)
        return [(os.path.normpath(f"{source.path}/{f}"), folder / f) for f in list_files(folder)]
    found: dict[str, Path] = {}
    for pattern in source.files:
        _below(data, pattern)
        names = glob.glob(pattern, root_dir=data, recursive=True) if glob.has_magic(pattern) else [pattern]
        here = {os.path.normpath(n): data / n for n in names if (data / n).is_file()}
        if not here:
            raise DataError(f"there is no file {data / pattern}", wanted=f"a {source.kind} corpus", cure=_FETCH)
        found |= here
    return sorted(found.items())


def read_source(source: Source, data: Path) -> Outcomes:
    """All drafts and refusals of a source, in the order of its sorted files."""
    absolute = os.path.abspath(data)
    if isinstance(source, FolderSource):
        return read_folders(source, _below(data, source.path), absolute)
    if isinstance(source, TableSource):
        return read_table(source, files_of(source, data), absolute)
    if isinstance(source, KeypadSource):
        name = f"{KEYPAD_FOLDER}/{KEYPAD_TABLE}"
        chat = ChatSource(kind="chat", files=[name], root=KEYPAD_FOLDER)
        return read_chat(chat, [(name, data / name)], absolute)
    return read_chat(source, files_of(source, data), absolute)


def _below(data: Path, path: str) -> Path:
    if os.path.isabs(path) or ".." in Path(path).parts:
        raise DataError(f"the source path {path!r} leaves the data folder", cure="give a path below --data")
    return data / path
