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
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mmlm.asking import Stopped, ask_store, forget, known, remember, stat, trying
from mmlm.errors import DataError
from mmlm.object_cache import Cache, evict, fetch, lock_shared, open_cached
from mmlm.stores import Changed, Exists, Stat, Transient, blank, scheme_of

__all__ = [
    "ask", "below", "copy", "evict", "expand", "fetch", "forget", "known", "prefetch", "put", "read", "read_range", "scheme_of",
    "stat", "stream",
]  # fmt: skip
LISTED_FROM = 50
"""Objects of one folder from which on a listing is cheaper than asking for each."""
PARALLEL = 16
"""Downloads at a time in `prefetch`."""
STREAM_BYTES = 8 << 20
"""Bytes of one request of `stream`."""


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
    found = trying(lambda: ask_store(prefix, lambda store: store.list(prefix)))
    asked = prefix.partition("://")[0] + "://"  # gcs:// stays gcs://
    named = {asked + uri.partition("://")[2]: told for uri, told in found if not uri.endswith("/")}
    for uri, told in named.items():
        remember(uri, told)
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


def read(uri: str, limit: int | None = None) -> bytes:
    """The bytes of the object. Raises as `fetch` does."""
    with open_cached(uri, limit)[1] as file:
        return file.readall()


def prefetch(uris: Iterable[str], limit: int | None = None) -> None:
    """Fetch objects into the cache side by side, so that reading them one after the other does not wait for each.

    One that is not there or not to be had is passed over: who reads it is told. Raises LaunchError.
    """

    def one(uri: str) -> None:
        with contextlib.suppress(DataError):
            open_cached(uri, limit)[1].close()

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
    with contextlib.suppress(FileNotFoundError), lock_shared(Cache().path(uri, told)) as file:
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
                ask_store(uri, lambda store: store.read(uri, told, offset + before, end, held.extend))
        except Changed as error:
            raise DataError(str(error), cure="was it replaced while it was read? run again") from None
        except Transient as error:
            raise Stopped(error, len(held) - before) from None
        if told.size >= 0 and offset + len(held) < end:
            raise Stopped(Transient(f"{blank(uri)} sent too few bytes"), len(held) - before)

    trying(more)
    return bytes(held)


def put(uri: str, path: Path, sha256: str) -> bool:
    """Store the file `path`, whose sha256 is given, under `uri`, without replacing anything.

    Returns whether it was stored: False when an object is there already.
    """

    def once() -> bool:
        try:
            ask_store(uri, lambda store: store.put(uri, path, sha256))
        except Exists:
            return False
        except Changed as error:
            raise DataError(str(error)) from None
        return True

    forget(uri)
    return trying(once)


def copy(source: str, sha256: str, uri: str) -> bool:
    """Store under `uri` what lies under `source` in the same store, without replacing anything or fetching it.

    Returns whether it was stored: False when `source` does not have that sha256, by what `put` stored beside it, when an
    object is there already, and when the store does not copy.
    """
    if scheme_of(source) != scheme_of(uri):
        return False

    def once() -> bool:
        told = stat(source)
        if told.sha256 != sha256:
            return False
        try:
            ask_store(uri, lambda store: store.copy(source, told, uri))
        except (Exists, Changed):
            return False
        return True

    forget(uri)
    with contextlib.suppress(DataError):  # not there, too large for it (5 GB on S3), or not known to this kind of store
        return trying(once)
    return False
