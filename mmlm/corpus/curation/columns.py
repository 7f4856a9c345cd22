"""Arrays that grow on disk, and the same function over many batches in several processes, in order."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")
U = TypeVar("U")
ALONE = 64
"""Batches up to which starting processes costs more than it saves."""
AHEAD_BYTES = 32 << 20
"""Bytes of batches that are in memory at a time."""


class GrowingArray:
    """An array that is appended to on disk and then read by memory map: what does not fit in memory stays outside."""

    def __init__(self, path: Path, dtype: Any, width: int = 1) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.dtype, self.width = path, np.dtype(dtype), width
        self._file = path.open("wb")

    def append(self, values: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(values, dtype=self.dtype).data)

    def read(self) -> np.ndarray:
        """All of it, (n,) or (n, width), read-only. Nothing can be appended afterwards."""
        self._file.close()
        size = self.path.stat().st_size // self.dtype.itemsize
        if not size:
            found = np.empty(0, dtype=self.dtype)
        else:
            found = np.memmap(self.path, dtype=self.dtype, mode="r")
        return found.reshape(-1, self.width) if self.width > 1 else found


def in_order(
    function: Callable[[T], U], batches: Iterable[T], workers: int, weight: Callable[[T], int] = lambda batch: 0
) -> Iterator[U]:
    """`function` of every batch, in order; by `workers` processes where there are more than ALONE batches, or more than
    AHEAD_BYTES by `weight`.

    `function` must be a function of a module (or a partial of one), and pure: the results do not depend on `workers`.
    At most AHEAD_BYTES of batches, or one, wait at a time.
    """
    stream = iter(batches)
    head: list[T] = []
    held = 0
    while workers > 1 and len(head) <= ALONE and held <= AHEAD_BYTES and (more := list(islice(stream, 1))):
        head += more
        held += weight(more[0])
    if len(head) <= ALONE and held <= AHEAD_BYTES:
        yield from map(function, chain(head, stream))
        return
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context(method)) as pool:
        waiting: deque[tuple[int, Future[U]]] = deque()
        held = 0
        for batch in chain(head, stream):
            size = weight(batch)
            while waiting and (len(waiting) > 4 * workers or held + size > AHEAD_BYTES):
                gone, future = waiting.popleft()
                held -= gone
                yield future.result()
            waiting.append((size, pool.submit(function, batch)))
            held += size
        while waiting:
            yield waiting.popleft()[1].result()
