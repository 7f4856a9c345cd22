"""Bytes at rest: atomic local writes, hashes, and reading by URI (local path, or anything fsspec knows)."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from mmlm.errors import DataError

MAX_FILE_BYTES = 512 << 20
"""A single media file larger than this is refused before it is read."""


def sha256_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hash of a JSON value, independent of key order."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return sha256_bytes(text.encode())


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under `path` whole or not at all (temporary name, fsync, rename)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)
        fsync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    with atomic_write(path) as f:
        f.write(data)


def write_json(path: Path, value: Any) -> None:
    write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True) + "\n").encode())


def is_remote(uri: str) -> bool:
    return "://" in uri and not uri.startswith("file://")


def resolve(uri: str, root: Path | str) -> str:
    """`uri` as something to open: remote and absolute URIs as they are, others below `root`.

    Raises DataError when a relative URI climbs out of `root`.
    """
    if is_remote(uri):
        return uri
    uri = uri.removeprefix("file://")
    if os.path.isabs(uri):
        return uri
    if is_remote(str(root)):
        return f"{str(root).rstrip('/')}/{uri}"
    if "\0" in uri or ".." in Path(uri).parts:
        raise DataError(
            f"the path {uri!r} climbs out of the data folder", cure="give paths below --data, or absolute ones"
        )
    return str(Path(root) / uri)


def read_uri(uri: str, root: Path | str = ".", limit: int = MAX_FILE_BYTES) -> bytes:
    """The bytes behind a URI. Raises DataError when it is missing, not a regular file, or larger than `limit` bytes."""
    where = resolve(uri, root)
    if is_remote(where):
        import fsspec

        try:
            with fsspec.open(where, "rb") as f:
                data: bytes = f.read(limit + 1)
        except (OSError, ImportError, ValueError) as error:
            raise DataError(f"cannot read {where}: {error}") from None
    else:
        try:
            found = os.stat(where)
            if not stat.S_ISREG(found.st_mode):
                raise DataError(f"{where} is no regular file", cure="check the path")
            if found.st_size > limit:
                raise DataError(f"{where} is larger than {limit:,} bytes", cure="split it")
            # whole and unbuffered: `read(limit)` would first allocate `limit` bytes
            with open(where, "rb", buffering=0) as f:
                data = f.read()
        except (FileNotFoundError, NotADirectoryError):
            raise DataError(f"there is no file {where}", cure="check the path") from None
        except OSError as error:
            raise DataError(f"cannot read {where}: {error.strerror}", cure="check the path and its rights") from None
        except ValueError:
            raise DataError(f"{where!r} is no path", cure="check the path") from None
    if len(data) > limit:
        raise DataError(f"{where} is larger than {limit:,} bytes", cure="split it")
    return data
