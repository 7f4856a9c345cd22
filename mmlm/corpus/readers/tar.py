"""The members of a plain tar, found by its header blocks alone: nothing is extracted, and no library is trusted with it.

POSIX.1-1988 (ustar), POSIX.1-2001 (pax) and GNU headers: https://pubs.opengroup.org/onlinepubs/9699919799/utilities/pax.html
and the "Standard" chapter of the GNU tar manual. Regular members count; folders are passed over; links, devices, sparse
files and the rest are named with a problem, so that the sample they belong to can be refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from mmlm.corpus.drafts import RefuseError

BLOCK = 512
MAX_NAME_BYTES = 1 << 20
"""Bytes of a long name or of a pax header; more is no name."""
_COMPRESSED = {
    b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip",
}  # fmt: skip
_PROBLEMS = {
    b"1": ("link_member", "a hard link"), b"2": ("link_member", "a symbolic link"),
    b"3": ("device_member", "a device"), b"4": ("device_member", "a device"), b"6": ("device_member", "a pipe"),
    b"S": ("sparse_member", "a sparse file"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Member:
    """A member: its bytes are `size` at `offset`. `problem` is a reason why it must not be used, with its `detail`."""

    name: str
    offset: int
    size: int
    problem: str = ""
    detail: str = ""


def read_members(f: BinaryIO, total: int) -> Iterator[Member]:
    """Members of the tar `f` of `total` bytes, in order; between two of them the caller may seek.

    Raises RefuseError: compressed_tar, bad_tar, truncated_tar (a member that is cut off is yielded before, with that
    problem), data_after_end. What was yielded until then is good.
    """
    at, long_name, pax, first = 0, b"", dict[bytes, bytes](), True
    while True:
        f.seek(at)
        block = f.read(BLOCK)
        if first:
            _require_plain(block)
        if len(block) < BLOCK:
            raise RefuseError("truncated_tar", f"it ends at byte {total:,} without an end mark; the rest is missing")
        if not block.strip(b"\0"):
            _require_no_more(f)
            return
        if not _sum_is_right(block):
            raise RefuseError("bad_tar", f"no header at byte {at:,}; the rest is not read")
        kind = block[156:157]
        size = _number(block[124:136], at)
        if b"size" in pax and kind not in b"xgLK":
            size = _decimal(pax[b"size"], at)
        data, at = at + BLOCK, at + BLOCK + (size + BLOCK - 1) // BLOCK * BLOCK
        first = False
        if kind in (b"x", b"g", b"L", b"K"):
            if size > MAX_NAME_BYTES:
                raise RefuseError("bad_tar", f"a name of {size:,} bytes at byte {data:,}; the rest is not read")
            held = f.read(size)
            if len(held) < size:
                raise RefuseError("truncated_tar", f"it ends at byte {total:,}; the rest is missing")
            if kind == b"L":
                long_name = held.rstrip(b"\0")
            elif kind == b"x":
                pax = _pax(held, data)
            elif kind == b"g" and _pax(held, data).keys() & {b"path", b"size"}:
                raise RefuseError("bad_tar", "a global header that names all members; the rest is not read")
            continue
        raw = pax.get(b"path") or long_name or _short_name(block)
        sparse = any(key.startswith(b"GNU.sparse.") for key in pax)
        long_name, pax = b"", {}
        if kind == b"5" or (kind == b"\0" and raw.endswith(b"/")):
            continue
        name, problem, detail = _name(raw)
        if not problem and sparse:
            problem, detail = _PROBLEMS[b"S"]
        elif not problem and kind not in (b"0", b"\0", b"7"):
            problem, detail = _PROBLEMS.get(kind, ("odd_member", f"a member of type {kind!r}"))
        if problem in ("link_member", "device_member"):
            size, at = 0, data  # they have no bytes, whatever the header says
        if data + size > total:
            yield Member(
                name, data, size, "truncated_tar", f"{size:,} bytes, of which {max(0, total - data):,} are there"
            )
            raise RefuseError("truncated_tar", f"it ends at byte {total:,} within {name[:80]!r}; the rest is missing")
        yield Member(name, data, size, problem, detail)


def _require_plain(block: bytes) -> None:
    for magic, name in _COMPRESSED.items():
        if block.startswith(magic):
            raise RefuseError(
                "compressed_tar", f"it is packed with {name}, and members are read in place; unpack it to a plain .tar"
            )
    if not block:
        raise RefuseError("bad_tar", "an empty file")
    if len(block) < BLOCK or (block.strip(b"\0") and not _sum_is_right(block)):
        raise RefuseError("bad_tar", "it is no tar")


def _require_no_more(f: BinaryIO) -> None:
    """What follows the end mark is padding; anything else is data that would be lost in silence."""
    while more := f.read(1 << 20):
        if more.strip(b"\0"):
            raise RefuseError("data_after_end", "something follows the end mark (several tars in one?); it is not read")


def _sum_is_right(block: bytes) -> bool:
    try:
        told = int(block[148:156].strip(b" \0") or b"x", 8)
    except ValueError:
        return False
    return told == sum(block[:148]) + 8 * 32 + sum(block[156:])


def _number(field: bytes, at: int) -> int:
    if field[0] == 0x80:  # GNU: base 256 for what is larger than 8 GiB
        return int.from_bytes(field[1:])
    try:
        value = int(field.split(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        value = -1
    if value < 0:
        raise RefuseError("bad_tar", f"a size that is no number at byte {at:,}; the rest is not read")
    return value


def _decimal(field: bytes, at: int) -> int:
    if not field.isdigit() or len(field) > 18:
        raise RefuseError("bad_tar", f"a size that is no number at byte {at:,}; the rest is not read")
    return int(field)


def _pax(data: bytes, at: int) -> dict[bytes, bytes]:
    """The `length key=value` lines of a pax header."""
    found: dict[bytes, bytes] = {}
    while data.strip(b"\0"):
        digits, _, _ = data.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) < 9 else 0
        key, equals, value = data[len(digits) + 1 : length - 1].partition(b"=")
        if length <= len(digits) + 1 or length > len(data) or not equals or data[length - 1 : length] != b"\n":
            raise RefuseError("bad_tar", f"a broken pax header at byte {at:,}; the rest is not read")
        found[key] = value
        data = data[length:]
    return found


def _short_name(block: bytes) -> bytes:
    name, prefix = block[:100].split(b"\0")[0], block[345:500].split(b"\0")[0]
    return prefix + b"/" + name if block[257:263] == b"ustar\0" and prefix else name


def _name(raw: bytes) -> tuple[str, str, str]:
    """(name, problem, detail); a name that cannot be used is escaped."""
    try:
        name = raw.decode()
    except UnicodeDecodeError:
        return ascii(raw)[2:-1], "bad_name", "the member's name is not UTF-8"
    if "\0" in name or not name:
        return name.replace("\0", "\\0"), "unsafe_path", "a name with a NUL character in it, or none"
    while name.startswith("./"):
        name = name[2:]
    if name.startswith("/") or ".." in name.replace("\\", "/").split("/"):
        return name, "unsafe_path", "a name that climbs out of its folder"
    return name, "", ""
