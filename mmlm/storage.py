"""Bytes at rest: atomic local writes, hashes, and reading by URI (a local path, or what `mmlm.remote` reads)."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import posixpath
import re
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from mmlm.config import blank_credentials
from mmlm.errors import ConfigError, DataError, TooLargeError

MAX_FILE_BYTES = 512 << 20
"""A single media file larger than this is refused before it is read."""

_SECONDS = r"[0-9]{1,9}(?:\.[0-9]{0,9})?"
_TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.tmp\Z")
_FRAGMENT = re.compile(rf"(?:#bytes=([0-9]{{1,18}})\+([0-9]{{1,18}}))?(?:#t=({_SECONDS}),({_SECONDS}))?\Z")


def local_folder(text: str, cure: str = "") -> Path:
    """A folder to write into, as somebody named it. Raises ConfigError for an address: a path would make `s3:` of it."""
    if "://" in text:
        raise ConfigError(
            f"{blank_credentials(text)[:200]} is an address",
            wanted="a folder of this machine, without `://`",
            cure=cure,
        )
    return Path(text)


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
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT) and not error.filename:  # that of a write does not say where
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def temporaries(folder: Path) -> list[Path]:
    """The files of `atomic_write` in `folder` that did not get their names: it is at work, or was killed."""
    return [path for path in folder.glob(".*.tmp") if _TEMPORARY.search(path.name)]


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
    if "\0" in uri or (".." in uri and ".." in uri.split("/")):
        raise DataError(
            f"the path {uri!r} climbs out of the data folder", cure="give paths below --data, or absolute ones"
        )
    if is_remote(str(root)):
        return f"{str(root).rstrip('/')}/{posixpath.normpath(uri)}"
    # as text: pathlib takes 40 µs of the 2 ms of a picture
    return os.path.join(root, posixpath.normpath(uri))


def split_fragment(uri: str) -> tuple[str, tuple[float, float] | None, tuple[int, int] | None]:
    """`uri` without its fragments; the piece of a sound or video that it means, (start, end) in seconds, as in
    `talk.wav#t=30,60` (W3C Media Fragments); and the bytes of the file that it means, (offset, count), as in
    `a.tar#bytes=1024+512`. Both may stand in one URI, the bytes first. Any other `#` belongs to the name.
    """
    found = _FRAGMENT.search(uri) if "#" in uri else None
    if not found or not found[0]:
        return uri, None, None
    span = (float(found[3]), float(found[4])) if found[3] else None
    return uri[: found.start()], span, (int(found[1]), int(found[2])) if found[1] else None


def read_uri(uri: str, root: Path | str = ".", limit: int = MAX_FILE_BYTES) -> bytes:
    """The bytes behind a URI; with `#bytes=` only those of the file, while `#t=` is left to who decodes them.

    Raises DataError when it is missing, not a regular file, or ends before the wanted bytes, TooLargeError when it has
    more than `limit` bytes, LaunchError when a remote store does not answer.
    """
    uri, _, within = split_fragment(uri)
    if within:
        return _read_within(resolve(uri, root), *within, limit)
    where = resolve(uri, root)
    if is_remote(where):
        from mmlm import remote  # here, since most never need it, and a model's bundle goes without

        return remote.read(where, limit)
    try:
        found = os.stat(where)
        if not stat.S_ISREG(found.st_mode):
            raise DataError(f"{where} is no regular file", cure="check the path")
        if found.st_size > limit:
            raise TooLargeError(f"{where} is larger than {limit:,} bytes", cure="split it")
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
        raise TooLargeError(f"{where} is larger than {limit:,} bytes", cure="split it")
    return data


def prefetch(uris: list[str], root: Path | str, limit: int = MAX_FILE_BYTES) -> None:
    """Fetch those of `uris` that lie elsewhere into the local cache, side by side; what cannot be had is passed over.

    Raises LaunchError when a store does not answer.
    """
    elsewhere = []
    for uri in uris if is_remote(str(root)) else filter(is_remote, uris):
        bare, _, within = split_fragment(uri)
        with contextlib.suppress(DataError):
            if not within and is_remote(where := resolve(bare, root)):
                elsewhere.append(where)
    if elsewhere:
        from mmlm import remote

        remote.prefetch(elsewhere, limit)


def _read_within(where: str, offset: int, count: int, limit: int) -> bytes:
    """Bytes `offset` to `offset + count` of a file, and no other byte of it read."""
    what = f"the {count:,} bytes at {offset:,} of {blank_credentials(where)}"
    if count > limit:
        raise TooLargeError(f"{what} are larger than {limit:,} bytes", cure="split it")
    try:
        if is_remote(where):
            from mmlm import remote

            data = remote.read_range(where, offset, count)
        else:
            with open(where, "rb", buffering=0) as f:
                found = os.fstat(f.fileno())
                if not stat.S_ISREG(found.st_mode):
                    raise DataError(f"{where} is no regular file", cure="check the path")
                data = os.pread(f.fileno(), count, offset) if offset + count <= found.st_size else b""
    except FileNotFoundError:
        raise DataError(f"there is no file {where}", cure="check the path") from None
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {where}: {error}", cure="check the path and its rights") from None
    if len(data) != count:
        raise DataError(f"{what}: the file ends before them", cure="was it changed after the scan? scan again")
    return data
