"""PNGs with damage of every kind: what is whole comes out as Pillow gives it, and nobody writes to the terminal."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from mmlm.features import png
from mmlm.features.failures import SampleError
from mmlm.features.image import decode_by_pillow, decode_image
from mmlm.features.image_header import read_png
from mmlm.features.spec import ImageSpec

SPEC = ImageSpec(size=32, patch=8, channels=3)
SIZE, STRIDE = 48, 1 + 3 * 48
ROWS = b"".join(b"\0" + bytes(np.random.default_rng(row).integers(0, 256, STRIDE - 1, np.uint8)) for row in range(SIZE))
BOTH = zlib.compress(ROWS)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def made(*chunks: bytes, side: int = SIZE, head: bytes = b"\x08\x02\0\0\0") -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join((chunk(b"IHDR", struct.pack(">II", side, side) + head), *chunks))


END = chunk(b"IEND", b"")
IDAT = chunk(b"IDAT", BOTH)
WHOLE = made(IDAT, END)
FINE = {
    "whole": WHOLE,
    "in pieces": made(*(chunk(b"IDAT", BOTH[at : at + 100]) for at in range(0, len(BOTH), 100)), chunk(b"IDAT", b""), END),
    "stored": made(chunk(b"IDAT", zlib.compress(ROWS, 0)), END),
    "odd notes": made(chunk(b"tEXt", b"no end"), chunk(b"gAMA", b"\0\0\0\0"), chunk(b"sBIT", b"\x09\0\0"),
                      chunk(b"bKGD", b"\1"), IDAT, chunk(b"tIME", b"never"), END),
}  # fmt: skip
BROKEN = {
    "half of the rows": made(chunk(b"IDAT", zlib.compress(ROWS[: len(ROWS) // 2])), END),
    "too many rows": made(chunk(b"IDAT", zlib.compress(ROWS + ROWS)), END),
    "a stream cut short": made(chunk(b"IDAT", BOTH[: len(BOTH) // 2]), END),
    "a stream without its checksum": made(chunk(b"IDAT", BOTH[:-4]), END),
    "a stream with another checksum": made(chunk(b"IDAT", BOTH[:-4] + b"abcd"), END),
    "no stream": made(chunk(b"IDAT", b"rubbish"), END),
    "no rows": made(END),
    "rows in two places": made(chunk(b"IDAT", BOTH[:99]), chunk(b"tEXt", b"a\0b"), chunk(b"IDAT", BOTH[99:]), END),
    "no such filter": made(chunk(b"IDAT", zlib.compress(ROWS[:STRIDE] + b"\x07" + ROWS[STRIDE + 1 :])), END),
    "two heads": made(chunk(b"IHDR", WHOLE[16:29]), IDAT, END),
    "no such compression": made(IDAT, END, head=b"\x08\x02\1\0\0"),
    "no pixels": made(IDAT, END, side=0),
    "another checksum of a chunk": WHOLE[:60] + bytes([WHOLE[60] ^ 16]) + WHOLE[61:],
    "no end": WHOLE[:-12],
    "half of the file": WHOLE[: len(WHOLE) // 2],
}


@pytest.mark.parametrize("name", FINE)
def test_what_is_whole_is_what_pillow_gives(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    header = read_png(FINE[name])
    assert header is not None and png.made_over(FINE[name], header)
    np.testing.assert_array_equal(decode_image(FINE[name], SPEC), decode_by_pillow(WHOLE, SPEC))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_left_to_pillow_without_a_word(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    header = read_png(BROKEN[name])
    assert header is None or png.made_over(BROKEN[name], header) is None
    with contextlib.suppress(SampleError):
        decode_image(BROKEN[name], SPEC)
    assert capfd.readouterr().err == ""


def test_no_flipped_bit_is_told_to_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        broken = bytearray(WHOLE)
        broken[rng.integers(8, len(broken))] ^= 1 << rng.integers(8)
        with contextlib.suppress(SampleError):
            decode_image(bytes(broken), SPEC)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("side", [3300, 3500])
def test_the_largest_are_not_held_and_looked_at_all_the_same(side: int, capfd: pytest.CaptureFixture[str]) -> None:
    row = b"\0" + bytes(range(250)) * (3 * side // 250 + 1)
    rows = row[: 1 + 3 * side] * side
    assert (len(rows) > png.HELD) == (side == 3500)
    whole = made(chunk(b"IDAT", zlib.compress(rows, 1)), END, side=side)
    with Image.open(io.BytesIO(whole)) as picture:
        expected = np.asarray(picture)
    found = decode_image(whole, ImageSpec(size=3600, patch=8, channels=3, resize="pad"))
    assert abs(float(found.mean()) - float(expected.mean())) < 1
    late = bytearray(rows)
    late[-1 - 3 * side] = 9
    broken = made(chunk(b"IDAT", zlib.compress(late, 1)), END, side=side)
    header = read_png(broken)
    assert header is not None and png.made_over(broken, header) is None
    assert capfd.readouterr().err == ""


def test_rows_that_shrink_to_nothing_are_all_found() -> None:
    for side in (600, 1111, 2222):
        whole = made(chunk(b"IDAT", zlib.compress(bytes((1 + 3 * side) * side), 9)), END, side=side)
        header = read_png(whole)
        assert header is not None and png.made_over(whole, header)
