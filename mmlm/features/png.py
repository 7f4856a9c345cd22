"""A PNG made over so that libpng finds nothing wrong in it: whatever libpng minds, it writes to the terminal of the user.

The rows are inflated here, once, and handed on stored; a broken stream, a row of no known filter or too few rows are
noticed before libpng sees them. Only the largest pictures are inflated twice, so that their rows are not held as well.
https://www.w3.org/TR/png-3/
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

from mmlm.features.image_header import PNG_SIGNATURE, PngHeader

HELD = 32 << 20
"""Bytes of rows up to which they are held."""
_BLOCK = 1 << 20
_FILTERS = 4
"""The largest number of a filter."""


def made_over(data: bytes, header: PngHeader) -> bytes | None:
    """A PNG with the same rows and nothing else in it; None when a row is missing or broken."""
    size = header.height * (1 + header.width * header.channels)
    try:
        blocks = _inflated(data, header, size)
        if size <= HELD:
            body = zlib.compress(b"".join(blocks), 0)
        else:
            for _ in blocks:
                pass
            body = b"".join(data[start:end] for start, end in header.pieces)
    except (ValueError, zlib.error):
        return None
    return b"".join((PNG_SIGNATURE, data[8:33], _chunk(b"IDAT", body), _chunk(b"IEND", b"")))


def _chunk(kind: bytes, body: bytes) -> bytes:
    return b"".join((struct.pack(">I", len(body)), kind, body, struct.pack(">I", zlib.crc32(body, zlib.crc32(kind)))))


def _inflated(data: bytes, header: PngHeader, size: int) -> Iterator[bytes]:
    """The `size` bytes of the rows in blocks. Raises ValueError or zlib.error when they are others."""
    inflater, at, stride = zlib.decompressobj(), 0, 1 + header.width * header.channels
    for start, end in header.pieces:
        waiting = data[start:end]
        while not inflater.eof:
            # one byte more than there should be, so that the end of the stream is seen with its checksum
            block = inflater.decompress(waiting, min(_BLOCK, size - at + 1))
            waiting = inflater.unconsumed_tail
            if not block and not waiting:  # the last bytes that went in may still give several blocks
                break
            if max(block[-at % stride :: stride], default=0) > _FILTERS:
                raise ValueError("a filter that there is not")
            at += len(block)
            if at > size:
                raise ValueError("more rows than the header tells")
            yield block
    if at < size or not inflater.eof:
        raise ValueError("fewer rows than the header tells")
