"""A USTAR file with nothing in it that depends on when, where or by whom it was written; and the reading of one.

Written by hand: small members are most of the work here, and the standard library spends longer on each of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import BinaryIO

BLOCK = 512
END = bytes(2 * BLOCK)
_PADDING = bytes(BLOCK)
_OWNER = b"0000644\0" + 2 * b"0000000\0"  # mode, owner, group
_TIME = 11 * b"0" + b"\0"
_REST = b"0" + bytes(100) + b"ustar\0" + b"00" + bytes(64) + 2 * b"0000000\0" + bytes(155 + 12)
_REST_SUM = sum(_OWNER + _TIME + _REST) + 8 * ord(" ")
"""Sum of a header's bytes, its name and size aside; the checksum itself counts as blanks."""


class TarWriter:
    """Appends regular members to `file`; keeps `offset` and the sha256 of all that was written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.offset = file, 0
        self.sha256 = hashlib.sha256()

    def add(self, name: str, data: bytes) -> int:
        """Write one member; returns the offset of its bytes."""
        at = self.offset + BLOCK
        # one piece: the parts are small, and each call of write and of the hash costs more than joining them
        self._write(b"".join((header(name, len(data)), data, _PADDING[: -len(data) % BLOCK])))
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
    if len(raw) > 100 or not 0 <= size < 8**11:
        raise ValueError(f"{name} of {size} bytes does not fit into a USTAR member")
    octal = b"%011o" % size
    return b"%b%b%b\0%b%06o\0 %b" % (
        raw.ljust(100, b"\0"),
        _OWNER,
        octal,
        _TIME,
        _REST_SUM + sum(raw) + sum(octal),
        _REST,
    )


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
