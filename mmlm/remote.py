"""Files that lie elsewhere: each object is fetched once, into a bounded cache on local disk, with retry and resume.

    path = fetch("s3://bucket/corpus/a.parquet")       # a local file, the same one for every process of this machine
    data = read("https://example.org/owl.png")         # its bytes

The cache is the folder MMLM_CACHE (default `~/.cache/mmlm/objects`), of at most MMLM_CACHE_BYTES (default 64 GiB); what
was used longest ago goes first, and never what is in use. A file in it is named after the address and the version (ETag,
generation) that the store tells, so an object that changed is fetched anew. A download that broke off is taken up where
it stopped, by this process or by the next.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import os
import random
import re
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mmlm import stores
from mmlm.errors import DataError, LaunchError, TooLargeError
from mmlm.stores import Changed, Exists, Stat, Store, Transient, blank, scheme_of

ATTEMPTS = 6
"""Failures in a row, without new bytes between them, after which a store is given up."""
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
"""Seconds to wait at most after the first failure (twice as long after each further one), and ever."""
DAMAGED_ATTEMPTS = 3
"""How often an object is fetched whose bytes are not those that the store tells of."""
PROGRESS = 1 << 20
"""New bytes that make a failure count as the first one again."""
STAT_SECONDS = 300.0
"""How long what a store told about an object is believed by the process that asked."""
REMEMBERED = 200_000
"""Objects about which it is remembered."""
HELD = 256
"""Fetched files that a process keeps from being evicted until it ends; beyond that, the oldest are let go."""
LISTED_FROM = 50
"""Objects of one folder from which on a listing is cheaper than asking for each."""
PARALLEL = 16
"""Downloads at a time in `prefetch`."""
STREAM_BYTES = 8 << 20
"""Bytes of one request of `stream`."""

T = TypeVar("T")
_stores: dict[tuple[Any, ...], Store] = {}
_known: OrderedDict[str, tuple[float, Stat]] = OrderedDict()
_held: OrderedDict[Path, int] = OrderedDict()
_lock = threading.RLock()


def _forget() -> None:
    """In a forked child: connections, and the thread that serves them, belong to the parent."""
    global _lock
    _lock = threading.RLock()
    _stores.clear()


os.register_at_fork(after_in_child=_forget)


def stat(uri: str) -> Stat:
    """Size and version of an object, asked of the store now. Raises DataError, or LaunchError when it does not answer."""
    found = _trying(lambda: _ask(uri, lambda store: store.stat(uri)))
    _remember(uri, found)
    return found


def expand(pattern: str) -> list[str]:
    """The objects that `pattern` stands for, sorted: `*`, `?`, `[…]` and `**` as in a shell; ending in `/`, all below it.

    A web address stands for itself. Raises DataError when the bucket is not there or not to be listed.
    """
    magic = re.search(r"[*?\[]", pattern)
    if scheme_of(pattern) == "http" or not (magic or pattern.endswith("/")):
        return [pattern]
    if not magic:
        return below(pattern)
    matches = re.compile(_regex(pattern)).fullmatch
    return [uri for uri in below(pattern[: magic.start()]) if matches(uri)]


def below(prefix: str) -> list[str]:
    """All objects whose addresses begin with `prefix` (of a folder: with a slash at its end), sorted; what the listing
    tells of them is remembered. Raises DataError when the bucket is not there or not to be listed."""
    found = _trying(lambda: _ask(prefix, lambda store: store.list(prefix)))
    asked = prefix.partition("://")[0] + "://"  # gcs:// stays gcs://
    named = {asked + uri.partition("://")[2]: told for uri, told in found if not uri.endswith("/")}
    for uri, told in named.items():
        _remember(uri, told)
    return sorted(named)


def ask(uris: list[str]) -> None:
    """Learn of the sizes and versions of objects, side by side; `known` tells of them then. Where many lie in one folder
    of a store that has listings, by one listing. What cannot be had is passed over."""
    folders = Counter(uri.rpartition("/")[0] + "/" for uri in uris if scheme_of(uri) != "http")
    for folder, count in folders.items():
        if count >= LISTED_FROM:
            with contextlib.suppress(DataError):
                below(folder)

    def one(uri: str) -> None:
        with contextlib.suppress(DataError):
            known(uri)

    with ThreadPoolExecutor(PARALLEL) as pool:
        for _ in pool.map(one, uris):
            pass


def _regex(pattern: str) -> str:
    """A shell pattern as a regular expression; `*` and `?` do not cross a `/`."""
    made, at = "", 0
    while at < len(pattern):
        one = pattern[at]
        closing = pattern.find("]", at + 2) if one == "[" else -1
        if pattern.startswith("**/", at):
            made, at = made + "(?:.*/)?", at + 3
        elif pattern.startswith("**", at):
            made, at = made + ".*", at + 2
        elif closing > 0:
            inside = pattern[at + 1 : closing].replace("\\", "\\\\").replace("[", "\\[")
            made, at = made + "[" + re.sub(r"^!", "^", inside) + "]", closing + 1
        else:
            made, at = made + {"*": "[^/]*", "?": "[^/]"}.get(one, re.escape(one)), at + 1
    return made


def fetch(uri: str, limit: int | None = None) -> Path:
    """A local file with the bytes of the object, which no process evicts while this one runs (for the last HELD of them).

    Its name ends as the object's does. Raises DataError when there is no such object, no access to it, or when it is
    larger than `limit` bytes; LaunchError when the store does not answer, or the disk is full.
    """
    path, file = _open(uri, limit)
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


def read(uri: str, limit: int | None = None) -> bytes:
    """The bytes of the object. Raises as `fetch` does."""
    with _open(uri, limit)[1] as file:
        return file.readall()


def prefetch(uris: Iterable[str], limit: int | None = None) -> None:
    """Fetch objects into the cache side by side, so that reading them one after the other does not wait for each.

    One that is not there or not to be had is passed over: who reads it is told. Raises LaunchError.
    """

    def one(uri: str) -> None:
        with contextlib.suppress(DataError):
            _open(uri, limit)[1].close()

    wanted = list(dict.fromkeys(uris))
    if wanted:
        with ThreadPoolExecutor(min(len(wanted), PARALLEL)) as pool:
            for _ in pool.map(one, wanted):
                pass


def read_range(uri: str, offset: int, size: int) -> bytes:
    """`size` bytes of the object from `offset` on, fewer when it ends before; from the cache if the object is there.

    Raises DataError, also when the object is replaced meanwhile, or LaunchError.
    """
    told = known(uri)
    with contextlib.suppress(FileNotFoundError), _lock_shared(_Cache().path(uri, told)) as file:
        return os.pread(file.fileno(), size, offset)
    return _range(uri, told, offset, size)


def stream(uri: str) -> Iterator[bytes]:
    """The bytes of the object piece by piece, from the store, whatever the cache holds. Raises as `read_range` does."""
    told, at = stat(uri), 0
    while told.size < 0 or at < told.size:
        data = _range(uri, told, at, STREAM_BYTES)
        if not data:
            return
        yield data
        at += len(data)


def _range(uri: str, told: Stat, offset: int, size: int) -> bytes:
    end = offset + size if told.size < 0 else min(offset + size, told.size)
    held = bytearray()

    def more() -> None:
        before = len(held)
        try:
            if offset + before < end:
                _ask(uri, lambda store: store.read(uri, told, offset + before, end, held.extend))
        except Changed as error:
            raise DataError(str(error), cure="was it replaced while it was read? run again") from None
        except Transient as error:
            raise _Stopped(error, len(held) - before) from None
        if told.size >= 0 and offset + len(held) < end:
            raise _Stopped(Transient(f"{blank(uri)} sent too few bytes"), len(held) - before)

    _trying(more)
    return bytes(held)


def put(uri: str, path: Path, sha256: str) -> bool:
    """Store the file `path`, whose sha256 is given, under `uri`, without replacing anything.

    Returns whether it was stored: False when an object is there already.
    """

    def once() -> bool:
        try:
            _ask(uri, lambda store: store.put(uri, path, sha256))
        except Exists:
            return False
        except Changed as error:
            raise DataError(str(error)) from None
        return True

    with _lock:
        _known.pop(uri, None)
    return _trying(once)


# ---------------------------------------------------------------- asking, again and again


class _Stopped(Exception):
    """A transient failure after `gained` new bytes."""

    def __init__(self, cause: Transient, gained: int) -> None:
        super().__init__(str(cause))
        self.wait, self.gained = cause.wait, gained


class _Damaged(Exception):
    """What came is not what the store tells of."""


def _trying(act: Callable[[], T]) -> T:
    """`act()`, again after a wait that doubles, with jitter, while it fails in ways that may pass."""
    failures = damaged = 0
    while True:
        try:
            return act()
        except _Damaged as error:
            damaged += 1
            if damaged >= DAMAGED_ATTEMPTS:
                raise DataError(f"{error}, {damaged} times", cure="is the object whole at its store?") from None
            wait = 0.0
        except (Transient, _Stopped) as error:
            failures = 1 if getattr(error, "gained", 0) >= PROGRESS else failures + 1
            if failures >= ATTEMPTS:
                raise LaunchError(
                    f"{error}; tried {failures} times",
                    cure="check the network and the store, then run the same command again: what is fetched stays",
                ) from None
            wait = error.wait
        longest = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (failures + damaged - 1))
        time.sleep(max(min(wait, 2 * LONGEST_WAIT), random.uniform(longest / 2, longest)))


def _ask(uri: str, what: Callable[[Store], Any]) -> Any:
    """Run one request of a store in fsspec's loop and wait for what it gives."""
    from fsspec.asyn import sync

    store = _store(scheme_of(uri))
    return sync(store.loop, what, store)


def _store(scheme: str) -> Store:
    # told apart by what may change under way in one process: which store, and as whom
    places = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_ACCESS_KEY_ID", "STORAGE_EMULATOR_HOST")
    key = (scheme, *map(os.environ.get, places))
    with _lock:
        if key not in _stores:
            _stores[key] = stores.open_store(scheme)
        return _stores[key]


def _remember(uri: str, found: Stat) -> None:
    with _lock:
        _known[uri] = (time.monotonic(), found)
        _known.move_to_end(uri)
        while len(_known) > REMEMBERED:
            _known.popitem(last=False)


def known(uri: str) -> Stat:
    """What `stat` tells, or told less than STAT_SECONDS ago."""
    with _lock:
        when, found = _known.get(uri, (0.0, None))
    return found if found and time.monotonic() - when < STAT_SECONDS else stat(uri)


# ---------------------------------------------------------------- the cache


@dataclass(frozen=True, slots=True)
class _Cache:
    """The folder of fetched objects; `<key>.part` is one being fetched, locked by who fetches it."""

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


def _lock_shared(path: Path) -> io.FileIO:
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


def _open(uri: str, limit: int | None) -> tuple[Path, io.FileIO]:
    """The object as a local file, opened and locked against eviction."""
    cache = _Cache()

    def attempt() -> tuple[Path, io.FileIO]:
        told = known(uri)
        if limit is not None and told.size > limit:
            raise TooLargeError(f"{blank(uri)} is larger than {limit:,} bytes", cure="split it")
        path = cache.path(uri, told)
        fetched = False
        while True:
            with contextlib.suppress(FileNotFoundError):
                file = _lock_shared(path)
                if fetched:  # only now, since it may be evicted while nobody holds it
                    _tidy(cache, os.fstat(file.fileno()).st_size)
                return path, file
            try:
                _download(uri, told, path, limit)
                fetched = True
            except Changed as error:
                if stat(uri) == told:  # the store contradicts itself
                    raise _Damaged(str(error)) from None
                raise _Stopped(Transient(str(error)), 0) from None

    try:
        return _trying(attempt)
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
                raise _Damaged(f"{blank(uri)} has more than the {told.size:,} bytes that its store tells of")
            if limit is not None and end > limit:
                raise TooLargeError(f"{blank(uri)} is larger than {limit:,} bytes", cure="split it")
            view = memoryview(data)
            while view:
                view = view[file.write(view) :]
        except OSError as error:  # of the disk: the store must not be asked again for it
            failed = error
            raise

    try:
        learned: Stat = _ask(uri, lambda store: store.read(uri, told, at, None, sink))
    except (Transient, OSError) as error:
        if failed:
            raise failed from None
        if not told.resumable:
            file.truncate(0)
        raise _Stopped(error if isinstance(error, Transient) else Transient(str(error)), end - at) from None
    except _Damaged:
        file.truncate(0)
        raise
    if end < told.size:
        raise _Stopped(Transient(f"{blank(uri)} stopped after {end:,} of {told.size:,} bytes"), end - at)
    return Stat(end, told.version, learned.md5 or told.md5, learned.crc32c or told.crc32c)


def _require_whole(uri: str, told: Stat, part: Path) -> None:
    """Raise _Damaged, and begin anew, when the checksum that the store tells is another one."""
    found = wanted = ""
    if told.md5:
        with part.open("rb") as file:
            found, wanted = hashlib.file_digest(file, "md5").hexdigest(), told.md5
    elif told.crc32c:
        found, wanted = _crc32c(part), told.crc32c
    if found != wanted:
        part.unlink()
        raise _Damaged(f"{blank(uri)} came with other bytes than its store's checksum tells")


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


def _tidy(cache: _Cache, size: int) -> None:
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
