"""A USTAR file with nothing in it that depends on when, where or by whom it was written; and the reading of one.

Written by hand: small members are most of the work here, and the standard library spends longer on each of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import BinaryIO

BLOCK = 512
END = bytes(2 * BLOCK)
_HEADER = (
    b"%(name)b"
    b"0000644\0" b"0000000\0" b"0000000\0"
    b"%(size)b" b"00000000000\0"
    b"%(sum)b" b"0" + bytes(100) +
    b"ustar\0" b"00" + bytes(32) + bytes(32) + b"0000000\0" b"0000000\0" + bytes(155) + bytes(12)
)  # fmt: skip


class TarWriter:
    """Appends regular members to `file`; keeps `offset` and the sha256 of all that was written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.offset = file, 0
        self.sha256 = hashlib.sha256()

    def add(self, name: str, data: bytes) -> int:
        """Write one member; returns the offset of its bytes."""
        padding = bytes(-len(data) % BLOCK)
        self._write(header(name, len(data)))
        at = self.offset
        self._write(data)
        self._write(padding)
        return at

    def close(self) -> None:
        self._write(END)

    def _write(self, data: bytes) -> None:
        self.file.write(data)
        self.sha256.update(data)
        self.offset += len(data)


def header(name: str, size: int) -> bytes:
    """The 512 bytes before a regular member: mode 0644, owner 0, time 0."""
    raw = name.encode("ascii")
    if len(raw) > 100 or size >= 8**11:
        raise ValueError(f"{name} of {size} bytes does not fit into a USTAR member")
    fields = {b"name": raw.ljust(100, b"\0"), b"size": b"%011o\0" % size, b"sum": b" " * 8}
    total = sum(_HEADER % fields)
    return _HEADER % {**fields, b"sum": b"%06o\0 " % total}


def members(file: BinaryIO) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of every member. Raises ValueError on anything that `TarWriter` does not write."""
    at = 0
    while True:
        file.seek(at)
        block = file.read(BLOCK)
        if block == bytes(BLOCK):
            return
        if len(block) < BLOCK:
            raise ValueError("it ends in the middle")
        name, size = block[:100].rstrip(b"\0").decode("ascii", "replace"), int(block[124:135], 8)
        if block != header(name, size):
            raise ValueError(f"the header at {at} is not ours")
        yield name, at + BLOCK, size
        at += BLOCK + size + -size % BLOCK
