"""The cache of objects that lie elsewhere: a folder that all processes of a machine share, bounded, each object once.

A file in it is named after the address and the version that the store tells; `<name>.part` is one being fetched, locked by
who fetches it and taken up where it ends. Who reads a file holds a shared lock on it, and what is locked is not evicted.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import os
import re
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmlm.asking import Damaged, Stopped, ask_store, known, stat, trying
from mmlm.errors import DataError, LaunchError, TooLargeError
from mmlm.stores import Changed, Stat, Transient, blank, scheme_of

HELD = 256
"""Fetched files that a process keeps from being evicted until it ends; beyond that, the oldest are let go."""
_held: OrderedDict[Path, int] = OrderedDict()
_lock = threading.RLock()


def _after_fork() -> None:
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_after_fork)


def fetch(uri: str, limit: int | None = None) -> Path:
    """A local file with the bytes of the object, which no process evicts while this one runs (for the last HELD of them).

    Its name ends as the object's does. Raises DataError when there is no such object, no access to it, or when it is
    larger than `limit` bytes; LaunchError when the store does not answer, or the disk is full.
    """
    path, file = open_cached(uri, limit)
    with _lock:
        if path in _held:
            file.close()
            _held.move_to_end(path)
        else:
            _held[path] = os.dup(file.fileno())  # the shared lock stays with it
            file.close()
            while len(_held) > HELD:
                os.close(_held.popitem(last=False)[1])
    return path


@dataclass(frozen=True, slots=True)
class Cache:
    """The folder of fetched objects."""

    def folder(self) -> Path:
        return Path(os.environ.get("MMLM_CACHE") or "~/.cache/mmlm/objects").expanduser()

    def limit(self) -> int:
        told = os.environ.get("MMLM_CACHE_BYTES", "")
        if told and not told.isdigit():
            raise DataError(f"MMLM_CACHE_BYTES is {told!r}", wanted="a number of bytes")
        return int(told or 64 << 30)

    def path(self, uri: str, told: Stat) -> Path:
        """Where the object lies when it is here. What has no version is known again by this process alone."""
        version = told.version or f"process {os.getpid()} {_STARTED}"
        key = hashlib.sha256(f"{uri}\0{version}\0{told.size}".encode("utf-8", "surrogatepass")).hexdigest()
        name = uri.split("?")[0].rpartition("/")[2] if scheme_of(uri) == "http" else uri.rpartition("/")[2]
        ending = re.search(r"(?:\.[A-Za-z0-9]{1,10}){1,2}$", name)
        return self.folder() / key[:2] / (key + (ending[0] if ending else ""))


_STARTED = time.time_ns()


def lock_shared(path: Path) -> io.FileIO:
    """The cached file, opened and locked against eviction. Raises FileNotFoundError."""
    while True:
        file = path.open("rb", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_SH)
            if _is_still(file, path):
                os.utime(file.fileno())  # the time of its last use
                return file
        except BaseException:
            file.close()
            raise
        file.close()


def _is_still(file: Any, path: Path) -> bool:
    """Whether the opened file is the one that `path` names now."""
    try:
        named = path.stat()
    except FileNotFoundError:
        return False
    opened = os.fstat(file.fileno())
    return (named.st_ino, named.st_dev) == (opened.st_ino, opened.st_dev)


def open_cached(uri: str, limit: int | None) -> tuple[Path, io.FileIO]:
    """The object as a local file, opened and locked against eviction."""
    cache = Cache()

    def attempt() -> tuple[Path, io.FileIO]:
        told = known(uri)
        if limit is not None and told.size > limit:
            raise TooLargeError(f"{blank(uri)} is larger than {limit:,} bytes", cure="split it")
        path = cache.path(uri, told)
        fetched = False
        while True:
            with contextlib.suppress(FileNotFoundError):
                file = lock_shared(path)
                if fetched:  # only now, since it may be evicted while nobody holds it
                    _tidy(cache, os.fstat(file.fileno()).st_size)
                return path, file
            try:
                _download(uri, told, path, limit)
                fetched = True
            except Changed as error:
                if stat(uri) == told:  # the store contradicts itself
                    raise Damaged(str(error)) from None
                raise Stopped(Transient(str(error)), 0) from None

    try:
        return trying(attempt)
    except OSError as error:
        raise LaunchError(
            f"the cache {cache.folder()} cannot be written ({error.strerror or error})",
            cure="free some space there, or set MMLM_CACHE to another folder",
        ) from None


def _download(uri: str, told: Stat, path: Path, limit: int | None) -> None:
    """Fetch the object into `path`; one process at a time, going on where a `.part` of the same version ends."""
    part = path.with_name(path.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    with part.open("ab", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if not _is_still(file, part) or path.exists():
            if path.exists() and _is_still(file, part):
                part.unlink()
            return  # another process was faster
        if not told.resumable:
            file.truncate(0)
        at = os.fstat(file.fileno()).st_size
        if 0 <= told.size < at:
            file.truncate(0)
            at = 0
        if at != told.size:
            told = _fill(uri, told, file, at, limit)
        _require_whole(uri, told, part)
        os.fdatasync(file.fileno())
        part.rename(path)


def _fill(uri: str, told: Stat, file: io.FileIO, at: int, limit: int | None) -> Stat:
    """Append what follows byte `at`. Returns what is known of the object by now."""
    end, failed = at, None

    def sink(data: bytes) -> None:
        nonlocal end, failed
        try:
            end += len(data)
            if 0 <= told.size < end:
                raise Damaged(f"{blank(uri)} has more than the {told.size:,} bytes that its store tells of")
            if limit is not None and end > limit:
                raise TooLargeError(f"{blank(uri)} is larger than {limit:,} bytes", cure="split it")
            view = memoryview(data)
            while view:
                view = view[file.write(view) :]
        except OSError as error:  # of the disk: the store must not be asked again for it
            failed = error
            raise

    try:
        learned: Stat = ask_store(uri, lambda store: store.read(uri, told, at, None, sink))
    except (Transient, OSError) as error:
        if failed:
            raise failed from None
        if not told.resumable:
            file.truncate(0)
        raise Stopped(error if isinstance(error, Transient) else Transient(str(error)), end - at) from None
    except Damaged:
        file.truncate(0)
        raise
    if end < told.size:
        raise Stopped(Transient(f"{blank(uri)} stopped after {end:,} of {told.size:,} bytes"), end - at)
    return Stat(end, told.version, learned.md5 or told.md5, learned.crc32c or told.crc32c)


def _require_whole(uri: str, told: Stat, part: Path) -> None:
    """Raise Damaged, and begin anew, when the checksum that the store tells is another one."""
    found = wanted = ""
    if told.md5:
        with part.open("rb") as file:
            found, wanted = hashlib.file_digest(file, "md5").hexdigest(), told.md5
    elif told.crc32c:
        found, wanted = _crc32c(part), told.crc32c
    if found != wanted:
        part.unlink()
        raise Damaged(f"{blank(uri)} came with other bytes than its store's checksum tells")


def _crc32c(path: Path) -> str:
    """CRC-32C (Castagnoli) of a file in the form that Google Cloud Storage tells it: big endian, base64."""
    import base64

    import google_crc32c  # comes with gcsfs

    value = 0
    with path.open("rb") as file:
        while data := file.read(1 << 20):
            value = google_crc32c.extend(value, data)
    return base64.b64encode(value.to_bytes(4, "big")).decode()


_fetched = 0
"""Bytes that this process added since it last looked at the size of the cache."""


def _tidy(cache: Cache, size: int) -> None:
    """Evict what was used longest ago when the cache is over its limit. Looks at the folder once in a while only."""
    global _fetched
    limit = cache.limit()
    with _lock:
        first, _fetched = _fetched == 0, _fetched + size
        if not first and _fetched < limit // 64:
            return
        _fetched = 1
    evict(cache.folder(), limit)


def evict(folder: Path, limit: int) -> int:
    """Remove files used longest ago until at most nine tenths of `limit` bytes are left, if there are more than `limit`;
    never one that a process reads or fetches. Returns the number of bytes removed."""
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context((folder / ".evict").open("w"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return 0  # another process is at it
            raise
        files: list[tuple[int, int, Path]] = []
        for path in folder.glob("??/*"):
            with contextlib.suppress(FileNotFoundError):
                found = path.stat()
                files.append((found.st_mtime_ns, found.st_size, path))
        total, removed = sum(size for _, size, _ in files), 0
        if total <= limit:
            return 0
        for _, size, path in sorted(files):
            if total - removed <= limit - limit // 10:
                break
            with contextlib.suppress(OSError), path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_still(file, path):
                    path.unlink()
                    removed += size
        return removed
