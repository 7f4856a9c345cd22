"""One request of an object store, again and again while its failure may pass; and what stores told is remembered.

Waits double from failure to failure, with jitter (M. Brooker, Exponential Backoff And Jitter, AWS Architecture Blog 2015).
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar

from mmlm.errors import DataError, LaunchError
from mmlm.stores import Stat, Store, Transient, scheme_of

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

T = TypeVar("T")
_stores: dict[tuple[Any, ...], Store] = {}
_known: OrderedDict[str, tuple[float, Stat]] = OrderedDict()
_lock = threading.RLock()


def _after_fork() -> None:
    """In a forked child: connections, and the thread that serves them, belong to the parent."""
    global _lock
    _lock = threading.RLock()
    _stores.clear()


os.register_at_fork(after_in_child=_after_fork)


def stat(uri: str) -> Stat:
    """Size and version of an object, asked of the store now. Raises DataError, or LaunchError when it does not answer."""
    found = trying(lambda: ask_store(uri, lambda store: store.stat(uri)))
    remember(uri, found)
    return found


class Stopped(Exception):
    """A transient failure after `gained` new bytes."""

    def __init__(self, cause: Transient, gained: int) -> None:
        super().__init__(str(cause))
        self.wait, self.gained = cause.wait, gained


class Damaged(Exception):
    """What came is not what the store tells of."""


def trying(act: Callable[[], T]) -> T:
    """`act()`, again after a wait that doubles, with jitter, while it fails in ways that may pass."""
    failures = damaged = 0
    while True:
        try:
            return act()
        except Damaged as error:
            damaged += 1
            if damaged >= DAMAGED_ATTEMPTS:
                raise DataError(f"{error}, {damaged} times", cure="is the object whole at its store?") from None
            wait = 0.0
        except (Transient, Stopped) as error:
            failures = 1 if getattr(error, "gained", 0) >= PROGRESS else failures + 1
            if failures >= ATTEMPTS:
                raise LaunchError(
                    f"{error}; tried {failures} times",
                    cure="check the network and the store, then run the same command again: what is fetched stays",
                ) from None
            wait = error.wait
        longest = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (failures + damaged - 1))
        time.sleep(max(min(wait, 2 * LONGEST_WAIT), random.uniform(longest / 2, longest)))


def ask_store(uri: str, what: Callable[[Store], Any]) -> Any:
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
            _stores[key] = open_store(scheme)
        return _stores[key]


def remember(uri: str, found: Stat) -> None:
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


def forget(uri: str | None = None) -> None:
    """Believe no longer what was told of the object, or of any."""
    with _lock:
        if uri is None:
            _known.clear()
        else:
            _known.pop(uri, None)


def open_store(scheme: str) -> Store:
    """The store for `scheme` (s3, gs, http) as the environment describes it.

    Raises DataError when its package is missing or there are no credentials.
    """
    try:
        if scheme == "s3":
            from mmlm.stores_s3 import S3  # here: most never need one

            return S3()
        from mmlm.stores_web import Gcs, Http

        return Gcs() if scheme == "gs" else Http()
    except ImportError as error:
        extra = {"s3": "s3", "gs": "gcs", "http": "remote"}[scheme]
        raise DataError(
            f"{'https' if scheme == 'http' else scheme}:// needs a package that is not there ({error.name})",
            cure=f'pip install "mmlm-workflows[{extra}]"',
        ) from None
