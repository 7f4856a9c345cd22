"""Grey of more than 8 bits: what the file says is white becomes white, and a dark picture stays dark."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from mmlm.features.image import decode_image
from mmlm.features.spec import ImageSpec
from tests.features.test_png import END, chunk

SIZE = 64
SPEC = ImageSpec(size=SIZE, patch=8, channels=1)
RAMP = np.linspace(0, 1, SIZE * SIZE).reshape(SIZE, SIZE)


def tiff(values: np.ndarray) -> bytes:
    held = io.BytesIO()
    Image.fromarray(values).save(held, "TIFF")
    return held.getvalue()


def grey_png(values: np.ndarray, bits: int | None = None) -> bytes:
    """(H, W) uint16 as a PNG of 16 bits; `bits` stands in its chunk sBIT."""
    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 0, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    told = [chunk(b"sBIT", bytes([bits]))] if bits is not None else []
    return b"".join((b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", head), *told, chunk(b"IDAT", zlib.compress(rows)), END))


@pytest.mark.parametrize(
    ("values", "white"),
    [(RAMP, 255), (RAMP / 2, 128), (RAMP * 255, 0), (RAMP * 65535, 255), (RAMP * 2 - 1, 255), (RAMP * 0, 0)],
    ids=["up to 1", "up to a half", "up to 255", "up to 65535", "from -1 to 1", "nothing"],
)
def test_floats(values: np.ndarray, white: int) -> None:
    found = decode_image(tiff(values.astype(np.float32)), SPEC)
    assert (int(found.min()), int(found.max())) == (0, white)


def test_a_large_float_picture_has_one_range() -> None:
    """It is shrunk in bands, most of which have no value above 1."""
    values = np.full((4000, 1500), 0.5, np.float32)
    values[-1, -1] = 40_000
    spec = ImageSpec(size=8, patch=8, channels=1, resize="stretch")
    assert decode_image(tiff(values), spec)[0, 0, 0] == 0
    values[-1, -1] = 1
    assert decode_image(tiff(values), spec)[0, 0, 0] == 128


def test_what_is_no_number_is_black_and_sets_no_range() -> None:
    values = RAMP.astype(np.float32)
    values[0] = np.nan
    found = decode_image(tiff(values), SPEC)
    assert (int(found[0].max()), int(found.max())) == (0, 255)


def test_a_png_that_tells_of_twelve_bits() -> None:
    values = np.rint(RAMP * 4095).astype(np.uint16)
    expected = (values >> 4).astype(np.uint8)[..., None]
    np.testing.assert_array_equal(decode_image(grey_png(values, 12), SPEC), expected)
    for widened in (values << 4, values << 4 | values >> 8):
        np.testing.assert_array_equal(decode_image(grey_png(widened, 12), SPEC), expected)
        dark = widened // 16 & 0xFFF0
        np.testing.assert_array_equal(decode_image(grey_png(dark, 12), SPEC)[..., 0], dark >> 8)
    noise = np.minimum(values << 4, 65530) + 5
    np.testing.assert_array_equal(decode_image(grey_png(noise, 12), SPEC)[..., 0], noise >> 8)


@pytest.mark.parametrize("bits", [None, 16, 0, 200])
def test_a_png_that_tells_nothing_has_all_sixteen(bits: int | None) -> None:
    values = np.rint(RAMP * 4095).astype(np.uint16)
    np.testing.assert_array_equal(decode_image(grey_png(values, bits), SPEC)[..., 0], values >> 8)


def test_a_tiff_of_twelve_bits() -> None:
    values = np.rint(RAMP * 4095).astype(np.uint16)
    pairs = values.reshape(-1, 2).astype(np.uint32)
    packed = (pairs[:, 0] << 12 | pairs[:, 1]).astype(">u4").view(np.uint8).reshape(-1, 4)[:, 1:].tobytes()
    fields = [(256, SIZE), (257, SIZE), (258, 12), (259, 1), (262, 1), (277, 1), (278, SIZE), (279, len(packed))]
    entries = sorted([*fields, (273, 8 + 2 + 12 * 9 + 4)])
    head = b"II*\0" + struct.pack("<IH", 8, len(entries))
    content = head + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries) + bytes(4) + packed
    np.testing.assert_array_equal(decode_image(content, SPEC)[..., 0], values >> 4)
