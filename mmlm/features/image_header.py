"""What the first bytes of a JPEG, PNG or WebP say, without a decoder: sizes are checked before anything is decoded, and plain
pictures are told from odd ones, which take the slow way.

JPEG: ITU-T T.81 annex B; the colour profile in APP2 by ICC.1:2022 annex B.4; the orientation in APP1 by EXIF 2.32.
PNG: the W3C recommendation, third edition. WebP: RFC 9649.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_MAX_MARKERS = 4096
_MAX_PIECES = 65_536
"""Chunks of compressed rows in a PNG."""
_MAX_SIDE = 1_000_000
"""Pixels that libpng takes a PNG to be wide or high, at most."""
_ORIENTATION = 0x0112
_FRAMES = frozenset({0xC0, 0xC1, 0xC2})
"""Start of frame: baseline, extended, progressive. All others (lossless, arithmetic) are left to Pillow."""
_PLAIN_CHUNKS = frozenset({b"IHDR", b"IDAT", b"IEND", b"pHYs", b"tIME", b"tEXt", b"zTXt", b"iTXt", b"gAMA", b"sRGB",
                           b"cHRM", b"bKGD", b"sBIT", b"hIST"})  # fmt: skip


@dataclass(frozen=True, slots=True)
class JpegHeader:
    width: int
    height: int
    components: int
    progressive: bool
    adobe: int | None
    """Colour transform named in APP14: 0 none, 1 YCbCr, 2 YCCK; None without that segment."""
    orientation: int
    """1 to 8 as in EXIF; 1 is upright."""
    profile: bytes
    """The ICC profile, or b"" when there is none or a part of it is missing."""


@dataclass(frozen=True, slots=True)
class PngHeader:
    width: int
    height: int
    channels: int
    """1 or 3."""
    pieces: tuple[tuple[int, int], ...] = ()
    """Where the compressed rows lie: (from, to) of each of their chunks."""


@dataclass(frozen=True, slots=True)
class WebpHeader:
    width: int
    height: int
    alpha: bool


def read_jpeg(data: bytes) -> JpegHeader | None:
    """The header of an 8-bit JPEG with Huffman coding; None when it is something else, or odd in any way."""
    at, adobe, orientation, frame = 2, None, 1, None
    profiles: dict[int, bytes] = {}
    wanted = 0
    for _ in range(_MAX_MARKERS):
        if len(data) < at + 4 or data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if marker == 0xDA:
            break
        if marker == 0x01 or 0xD0 <= marker <= 0xD9:
            return None
        size = data[at + 2] << 8 | data[at + 3]
        body, at = at + 4, at + 2 + size
        if size < 2 or at > len(data):
            return None
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if marker not in _FRAMES or size < 8 or frame is not None:
                return None
            precision, height, width, components = struct.unpack_from(">BHHB", data, body)
            if precision != 8 or not width or not height:
                return None
            frame = (width, height, components, marker == 0xC2)
        elif marker == 0xE1 and data[body : body + 6] == b"Exif\0\0":
            orientation = _orientation(data[body + 6 : at])
        elif marker == 0xE2 and data[body : body + 12] == b"ICC_PROFILE\0" and size >= 16:
            profiles[data[body + 12]], wanted = data[body + 14 : at], data[body + 13]
        elif marker == 0xEE and data[body : body + 5] == b"Adobe" and size >= 14:
            adobe = data[body + 11]
    else:
        return None
    if frame is None:
        return None
    whole = wanted and sorted(profiles) == list(range(1, wanted + 1))
    profile = b"".join(profiles[number] for number in sorted(profiles)) if whole else b""
    return JpegHeader(*frame, adobe, orientation, profile)


def _orientation(tiff: bytes) -> int:
    """Tag 0x0112 of the first directory of an EXIF block; 1 when it is not there or makes no sense."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None or len(tiff) < 8:
        return 1
    at = struct.unpack_from(order + "I", tiff, 4)[0]
    if at + 2 > len(tiff):
        return 1
    for number in range(struct.unpack_from(order + "H", tiff, at)[0]):
        entry = at + 2 + 12 * number
        if entry + 12 > len(tiff):
            return 1
        tag, kind = struct.unpack_from(order + "HH", tiff, entry)
        if tag == _ORIENTATION:
            value = struct.unpack_from(order + "H", tiff, entry + 8)[0] if kind == 3 else 1
            return int(value) if 1 <= value <= 8 else 1
    return 1


def read_png(data: bytes) -> PngHeader | None:
    """The header of a PNG of 8-bit grey or RGB whose chunks are whole, without alpha, profile, EXIF or animation; else None.

    The chunk that says how its light is to be read (gAMA, cHRM) is passed over, as every viewer of photographs does.
    """
    if not data.startswith(PNG_SIGNATURE) or data[12:16] != b"IHDR" or len(data) < 45:
        return None
    width, height, depth, colour, *odd = struct.unpack_from(">IIBBBBB", data, 16)
    if depth != 8 or colour not in (0, 2) or any(odd) or not (0 < width <= _MAX_SIDE and 0 < height <= _MAX_SIDE):
        return None
    pieces = _png_pieces(data)
    return PngHeader(width, height, 1 if colour == 0 else 3, pieces) if pieces else None


def _png_pieces(data: bytes) -> tuple[tuple[int, int], ...]:
    """(from, to) of each chunk of compressed rows; none when a chunk is odd, out of place, cut, or fails its checksum."""
    pieces: list[tuple[int, int]] = []
    at, before, view = 8, b"", memoryview(data)
    while at + 12 <= len(data):
        kind, end = data[at + 4 : at + 8], at + 8 + int.from_bytes(data[at : at + 4], "big")
        if kind not in _PLAIN_CHUNKS or end + 4 > len(data) or (kind == b"IHDR") != (at == 8):
            return ()
        if zlib.crc32(view[at + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            return ()
        if kind == b"IDAT":
            if (pieces and before != kind) or len(pieces) == _MAX_PIECES:
                return ()
            pieces.append((at + 8, end))
        elif kind == b"IEND":
            return tuple(pieces)
        at, before = end + 4, kind
    return ()


def read_webp(data: bytes) -> WebpHeader | None:
    """The header of a WebP of one picture, lossy or lossless, that has all its bytes and no profile, EXIF or animation.

    None for any other.
    """
    if len(data) < 30 or data[:4] != b"RIFF" or int.from_bytes(data[4:8], "little") + 8 > len(data):
        return None
    kind = data[8:16]
    if kind == b"WEBPVP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = (int.from_bytes(data[at : at + 2], "little") & 0x3FFF for at in (26, 28))
        return WebpHeader(width, height, False)
    if kind == b"WEBPVP8L" and data[20] == 0x2F:
        bits = int.from_bytes(data[21:25], "little")
        return WebpHeader((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, bool(bits >> 28 & 1))
    if kind == b"WEBPVP8X" and data[20] == 0x10:  # of all that may be announced, alpha only
        width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
        return WebpHeader(width, height, True)
    return None
