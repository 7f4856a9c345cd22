"""What the loader and its workers say to each other: JSON over a pair of sockets, arrays through memory without a name.

The memory is a `memfd`, handed over as an open file: nothing lies in /dev/shm, nothing is left behind by whatever kill,
and the limit that containers set for /dev/shm does not apply.
"""

from __future__ import annotations

import builtins
import json
import mmap
import os
import socket
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmlm import errors
from mmlm.errors import MmlmError

ALIGN = 64
GROWTH = 1 << 20
"""Bytes by which a Memory grows, so that batches of about the same size need not grow it again."""
Layout = dict[str, tuple[str, list[int], int]]
"""name → (type, shape, offset) of each array in a Memory."""


def send(channel: socket.socket, value: Any, handles: Sequence[int] = ()) -> None:
    data = json.dumps(value).encode()
    socket.send_fds(channel, [len(data).to_bytes(8, "little")], list(handles))
    channel.sendall(data)


def receive(channel: socket.socket) -> tuple[Any, list[int]] | None:
    """A message and the handles that came with it; None when the other side is gone."""
    try:
        head, handles, _, _ = socket.recv_fds(channel, 8, 1)
        if not head:
            return None
        head += _exactly(channel, 8 - len(head))
        return json.loads(_exactly(channel, int.from_bytes(head, "little"))), handles
    except (EOFError, ConnectionError):
        return None


def _exactly(channel: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        some = channel.recv(min(size - len(data), 1 << 20))
        if not some:
            raise EOFError
        data += some
    return bytes(data)


class Memory:
    """Memory that two processes share, as large as what was last written needs."""

    def __init__(self, handle: int | None = None) -> None:
        self.handle = _anonymous() if handle is None else handle
        self.size = 0
        self.map: mmap.mmap | None = None
        self._used = 0
        self._lent: list[tuple[np.ndarray, int]] = []

    def clear(self) -> None:
        """Forget what lies in it."""
        self._used = 0
        self._lent.clear()

    def empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Room for an array, which `write` then needs not copy."""
        kind = np.dtype(dtype)
        at, size = self._used, int(np.prod(shape, dtype=np.int64)) * kind.itemsize
        self._used += -(-size // ALIGN) * ALIGN
        self.reach(max(self._used, ALIGN))
        array = _at(np.frombuffer(self.map, np.uint8), kind.str, shape, at)  # type: ignore[arg-type]
        self._lent.append((array, at))
        return array

    def write(self, arrays: Mapping[str, np.ndarray]) -> tuple[Layout, int]:
        """Copy `arrays` into it, except what lies there; returns where they are and how large it is now."""
        layout: Layout = {}
        for name, array in arrays.items():
            at = self._place_of(array)
            if at < 0:
                np.copyto(self.empty(array.shape, array.dtype), array)
                at = self._lent[-1][1]
            layout[name] = (array.dtype.str, list(array.shape), at)
        return layout, self.size

    def _place_of(self, array: np.ndarray) -> int:
        for lent, at in self._lent:
            if array.nbytes and array.nbytes == lent.nbytes and np.may_share_memory(array, lent):
                return at
        return -1

    def reach(self, size: int) -> None:
        """See `size` bytes of it, which the other side may have added."""
        size = -(-size // GROWTH) * GROWTH
        if size > self.size:
            if os.fstat(self.handle).st_size < size:
                os.ftruncate(self.handle, size)
            self.map, self.size = mmap.mmap(self.handle, size), size

    def close(self) -> None:
        self.clear()
        os.close(self.handle)
        self.map = None


def arrays_of(whole: np.ndarray, layout: Layout) -> dict[str, np.ndarray]:
    """The arrays that lie in the bytes `whole`, without copying them."""
    return {name: _at(whole, *place) for name, place in layout.items()}


def _at(whole: np.ndarray, dtype: str, shape: Sequence[int], offset: int) -> np.ndarray:
    kind = np.dtype(dtype)
    size = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
    return whole[offset : offset + size].view(kind).reshape(shape)


def _anonymous() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("mmlm-batch", os.MFD_CLOEXEC)  # what `ls -l /proc/PID/fd` shows; no file has this name
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def describe(error: BaseException) -> dict[str, Any]:
    """An error as plain values; `rebuild` is the inverse."""
    said: dict[str, Any] = {"trace": "".join(traceback.format_exception(error)), "kind": type(error).__name__}
    if isinstance(error, MmlmError):
        base = next(c.__name__ for c in type(error).__mro__ if c.__module__ == errors.__name__)
        return {**said, "kind": base, "found": error.found, "wanted": error.wanted, "cure": error.cure}
    plain = all(isinstance(a, str | int | float) for a in error.args)
    return {**said, "args": list(error.args) if plain else [str(error)]}


def rebuild(said: Mapping[str, Any]) -> BaseException:
    """The same error, of the same class; of a class that only its library knows, a RuntimeError that names it."""
    error: BaseException
    if "found" in said:
        error = getattr(errors, said["kind"])(said["found"], wanted=said["wanted"], cure=said["cure"])
    else:
        kind = getattr(builtins, said["kind"], None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            error = kind(*said["args"])
        else:
            error = RuntimeError(f"{said['kind']}: {' '.join(map(str, said['args']))}")
    error.add_note(f"In a process that makes batches:\n{said['trace']}")
    return error
