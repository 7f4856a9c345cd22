"""Pictures that lie, burst, break off or reach outside: file name → (bytes, what becomes of it).

What becomes of it is `refused REASON` (by scan), `quarantine REASON` (by shard), or `kept` where the file is odd but a
picture all the same.
"""

from __future__ import annotations

import base64
import functools
import io
import struct
import zlib

import numpy as np
from PIL import Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"
Cases = dict[str, tuple[bytes, str]]


def encode(form: str, width: int = 40, height: int = 30, mode: str = "RGB", **options: object) -> bytes:
    """A picture of noise (of one colour from 1,000 pixels a side on) in the format `form`."""
    if max(width, height) < 1000:
        pixels = np.random.default_rng(0).integers(0, 256, (height, width, len(mode)), dtype=np.uint8)
        picture = Image.fromarray(pixels.squeeze())
    else:
        picture = Image.new(mode, (width, height), 0)
    held = io.BytesIO()
    picture.save(held, form, **options)
    return held.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    """One chunk of a PNG, with its right checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def ihdr(width: int, height: int, depth: int = 8, colour: int = 0) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))


def png(width: int, height: int, body: bytes, *before: bytes, depth: int = 8, colour: int = 0) -> bytes:
    """A PNG with `body` as its compressed rows and `before` as further chunks."""
    return (
        SIGNATURE + ihdr(width, height, depth, colour) + b"".join(before) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )


def flip(data: bytes, at: int, bits: int = 0xFF) -> bytes:
    """`data` with one byte changed."""
    at %= len(data)
    return data[:at] + bytes([data[at] ^ bits]) + data[at + 1 :]


def _zeros(count: int) -> bytes:
    """`count` zero bytes, packed, without ever holding them all."""
    packer, block = zlib.compressobj(6), bytes(1 << 20)
    whole = b"".join(packer.compress(block) for _ in range(count >> 20))
    return whole + packer.compress(bytes(count & 0xFFFFF)) + packer.flush()


def _webp_of_one_colour(width: int, height: int) -> bytes:
    """A lossless WebP (RFC 9649) in forty bytes: each of its five codes has one symbol, which takes no bits a pixel."""
    bits = [0, 0, 0] + [1, 0, 0, 0] * 5  # no transform, cache or groups; five simple codes of the one symbol 0
    value = (width - 1) | (height - 1) << 14
    for at, bit in enumerate(bits):
        value |= bit << (32 + at)
    stream = b"\x2f" + value.to_bytes(8, "little")
    body = b"WEBPVP8L" + struct.pack("<I", len(stream)) + stream + bytes(len(stream) % 2)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _png_cases() -> Cases:
    rows = zlib.compress(bytes(31 * 40), 9)  # 40 × 30 grey: a filter byte and 30 pixels a row
    good = png(30, 40, rows)
    zeros = _zeros(64 << 20)
    over = zlib.compress(bytes(1002 * 8000), 9)  # 8001 × 8000 at one bit a pixel
    text = b"comment\0\0" + zeros
    return {
        "empty.png": (b"", "refused unreadable_image"),
        "signature_only.png": (SIGNATURE, "refused unreadable_image"),
        "half_signature.png": (SIGNATURE[:5], "refused unreadable_image"),
        "no_ihdr.png": (SIGNATURE + chunk(b"IDAT", rows) + chunk(b"IEND", b""), "refused unreadable_image"),
        "no_idat.png": (SIGNATURE + ihdr(30, 40) + chunk(b"IEND", b""), "quarantine unreadable_image"),
        "zero_wide.png": (png(0, 40, rows), "refused unreadable_image"),
        "ten_gigapixels.png": (png(100_000, 100_000, rows), "refused too_many_pixels"),
        "most_pixels_that_fit_the_header.png": (png(2**31 - 1, 2**31 - 1, rows), "refused too_many_pixels"),
        "just_over_the_limit.png": (png(8001, 8000, over, depth=1), "quarantine bomb"),
        "just_below_the_limit.png": (png(7999, 8000, _zeros(8000 * (1 + 4 * 7999)), colour=6), "kept"),
        "more_rows_than_told.png": (png(30, 40, zeros), "kept"),  # what comes after the last row is not unpacked
        "fewer_rows_than_told.png": (png(3000, 4000, rows), "quarantine unreadable_image"),
        "rows_are_no_zlib.png": (png(30, 40, b"no zlib at all"), "quarantine unreadable_image"),
        "truncated.png": (encode("PNG")[:1500], "quarantine unreadable_image"),
        "bit_flipped.png": (flip(encode("PNG"), 1200), "quarantine unreadable_image"),
        "wrong_crc_of_header.png": (flip(good, 29), "refused unreadable_image"),
        "text_bomb.png": (png(30, 40, rows, chunk(b"zTXt", text)), "refused unreadable_image"),
        "international_text_bomb.png": (
            png(30, 40, rows, chunk(b"iTXt", b"comment\0\x01\0\0\0" + zeros)), "refused unreadable_image",
        ),
        "many_texts_bomb.png": (
            png(30, 40, rows, *[chunk(b"zTXt", b"k%d\0\0" % i + zlib.compress(bytes(1 << 20), 9)) for i in range(80)]),
            "refused unreadable_image",
        ),
        "profile_bomb.png": (png(30, 40, rows, chunk(b"iCCP", b"profile\0\0" + zeros)), "refused unreadable_image"),
        "palette_missing.png": (png(30, 40, rows, colour=3), "kept"),
        "chunk_longer_than_the_file.png": (
            SIGNATURE + ihdr(30, 40) + struct.pack(">I", 2**31 - 1) + b"IDAT" + rows, "kept",
        ),
        "absurd_frames.png": (
            png(30, 40, rows, chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0))), "kept",
        ),
        "impossible_depth.png": (png(30, 40, rows, depth=13), "refused unreadable_image"),
    }  # fmt: skip


def _gif(width: int, height: int, frame: tuple[int, int, int, int] = (0, 0, 2, 2)) -> bytes:
    """A GIF whose screen is width × height with one frame (left, top, width, height) of hardly any data."""
    head = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6)
    return head + b"," + struct.pack("<HHHHB", *frame, 0) + b"\x02\x03\x84\x51\x00\x00;"


def _other_rasters() -> Cases:
    webp = encode("WEBP", lossless=True)
    vp8x = b"VP8X" + struct.pack("<I", 10) + bytes([0x10, 0, 0, 0]) + b"\xff\x3f\x00" + b"\xff\x3f\x00"
    inner = webp[12:]
    lying = b"RIFF" + struct.pack("<I", 4 + len(vp8x) + len(inner)) + b"WEBP" + vp8x + inner
    jpeg = encode("JPEG", 200, 150)
    sof = jpeg.index(b"\xff\xc0")
    tall = jpeg[: sof + 5] + struct.pack(">HH", 65535, 65535) + jpeg[sof + 9 :]
    sos = jpeg.index(b"\xff\xda")
    bmp = encode("BMP")
    wide = bmp[:18] + struct.pack("<ii", 30_000, 30_000) + bmp[26:]
    return {
        "screen.gif": (_gif(65535, 65535), "refused too_many_pixels"),
        "frame_larger_than_screen.gif": (_gif(10, 10, (0, 0, 65535, 65535)), "refused too_many_pixels"),
        "just_over_the_limit.gif": (_gif(8001, 8000), "quarantine bomb"),
        "no_frame.gif": (b"GIF89a" + struct.pack("<HHBBB", 9, 9, 0, 0, 0) + b";", "refused unreadable_image"),
        "truncated.gif": (encode("GIF")[:900], "quarantine unreadable_image"),
        "script.gif": (b"GIF89a/*" + b"*/=1;alert(1);//" * 4, "refused unreadable_image"),
        "canvas_lies.webp": (lying, "refused too_many_pixels"),
        "all_one_colour.webp": (_webp_of_one_colour(16383, 12000), "refused too_many_pixels"),
        "just_over_the_limit.webp": (_webp_of_one_colour(8001, 8000), "quarantine bomb"),
        "just_below_the_limit.webp": (_webp_of_one_colour(7999, 8000), "kept"),
        "truncated.webp": (webp[: len(webp) // 2], "refused unreadable_image"),
        "riff_size_lies.webp": (webp[:4] + struct.pack("<I", 2**31) + webp[8:], "refused unreadable_image"),
        "nothing_inside.webp": (b"RIFF\x04\0\0\0WEBP", "refused unreadable_image"),
        "four_gigapixels.jpg": (tall, "refused too_many_pixels"),
        "just_over_the_limit.jpg": (encode("JPEG", 8001, 8000, "L"), "quarantine bomb"),
        "truncated.jpg": (jpeg[: len(jpeg) // 2], "quarantine unreadable_image"),
        "no_scan.jpg": (jpeg[:sos], "quarantine unreadable_image"),
        "no_size.jpg": (jpeg[:sof] + jpeg[sos:], "refused unreadable_image"),
        "ends_after_two_bytes.jpg": (b"\xff\xd8\xff", "refused unreadable_image"),
        "many_scans.jpg": (_many_scans(7992, 8000, 400), "quarantine bomb"),
        "nine_hundred_megapixels.bmp": (wide, "refused too_many_pixels"),
        "truncated.bmp": (bmp[:400], "quarantine unreadable_image"),
        "no_header.bmp": (bmp[:14], "refused unreadable_image"),
        "four_gigapixels.tif": (_tiff(60_000, 60_000), "refused too_many_pixels"),
        "strip_beyond_the_end.tif": (_tiff(30, 40, offset=1 << 30), "quarantine unreadable_image"),
        "strip_of_four_gigabytes.tif": (_tiff(300, 400, length=2**32 - 1), "quarantine unreadable_image"),
        "deflated_strip_bomb.tif": (
            _tiff(300, 400, compression=8, body=_zeros(64 << 20)), "kept",
        ),
        "directory_in_a_circle.tif": (_tiff(30, 40, following=8), "kept"),
        "directory_of_65535_tags.tif": (b"II*\0\x08\0\0\0\xff\xff" + bytes(64), "refused unreadable_image"),
        "sixty_thousand_samples.tif": (_tiff(30, 40, samples=60_000), "refused unreadable_image"),
    }  # fmt: skip


def _many_scans(width: int, height: int, scans: int) -> bytes:
    """A progressive JPEG whose every scan goes over all blocks again, in a few hundred bytes each.

    Decoders walk over the whole picture once a scan, so that a small file takes minutes.
    """
    blank = encode("JPEG", width, height, "L", progressive=True)
    last = blank.rindex(b"\xff\xda")
    end = blank.rindex(b"\xff\xd9")
    return blank[:last] + blank[last:end] * scans + blank[end:]


def _tiff(
    width: int, height: int, *, offset: int | None = None, length: int | None = None, body: bytes = b"\0" * 1200,
    compression: int = 1, following: int = 0, samples: int = 1,
) -> bytes:  # fmt: skip
    """A grey TIFF of one strip; every figure may lie."""
    tags = [
        (256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, compression), (262, 3, 1),
        (273, 4, 8 + 2 + 9 * 12 + 4 if offset is None else offset), (277, 3, samples), (278, 4, height),
        (279, 4, len(body) if length is None else length),
    ]  # fmt: skip
    directory = struct.pack("<H", len(tags))
    for tag, kind, value in tags:
        directory += struct.pack("<HHI", tag, kind, 1) + struct.pack("<I" if kind == 4 else "<Hxx", value)
    return b"II*\0" + struct.pack("<I", 8) + directory + struct.pack("<I", following) + body


def _svg(inner: str, attributes: str = 'width="40" height="40"', doctype: str = "") -> bytes:
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f"{doctype}<svg {names} {attributes}>{inner}</svg>".encode()


def _broken_drawings() -> Cases:
    """Nothing in them to draw, or not as they say."""
    return {
        "empty.svg": (b"", "refused unreadable_image"),
        "not_closed.svg": (_svg("<g>"), "quarantine unreadable_image"),
        "packed.svg": (b"\x1f\x8b\x08\0" + zlib.compress(_svg("<rect/>")), "refused unreadable_image"),
        "wide_as_the_sky.svg": (_svg("<rect/>", 'width="1e30" height="1e30"'), "kept"),
    }  # fmt: skip


def _drawings_that_reach_out(canary: str) -> Cases:
    """They name files, addresses and programs."""
    return {
        "entity_of_a_file.svg": (
            _svg("<text>&x;</text>", doctype='<!DOCTYPE svg [<!ENTITY x SYSTEM "file:///etc/passwd">]>'),
            "quarantine unreadable_image",
        ),
        "picture_from_a_file.svg": (_svg('<image xlink:href="/etc/passwd"/>'), "quarantine unsafe_svg"),
        "picture_from_elsewhere.svg": (_svg('<image href="http://127.0.0.1:9/x.png"/>'), "quarantine unsafe_svg"),
        "filter_from_a_file.svg": (
            _svg('<filter id="f"><feImage href="file:///etc/passwd"/></filter><rect filter="url(#f)"/>'),
            "quarantine unsafe_svg",
        ),
        "embedded_drawing.svg": (
            _svg('<image href="data:image/svg+xml;base64,PHN2Zy8+"/>'), "quarantine unsafe_svg",
        ),
        "script.svg": (
            _svg(f'<script>require("fs").writeFileSync("{canary}","")</script><rect onload="alert(1)" width="9"/>'),
            "kept",
        ),
        "included_file.svg": (
            _svg('<xi:include xmlns:xi="http://www.w3.org/2001/XInclude" href="file:///etc/passwd" parse="text"/>'),
            "kept",
        ),
        "style_from_elsewhere.svg": (
            b'<?xml-stylesheet href="http://127.0.0.1:9/a.css"?>'
            + _svg("<style>@import url(file:///etc/passwd);</style><rect/>"),
            "kept",
        ),
    }  # fmt: skip


def _drawings_that_unfold() -> Cases:
    """Small files with very much inside."""
    laughs = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 12))
    uses = "".join(f'<g id="u{i}">' + f'<use xlink:href="#u{i - 1}"/>' * 10 + "</g>" for i in range(1, 10))
    patterns = "".join(
        f'<pattern id="p{i}" width="1" height="1">' + f'<rect width="9" height="9" fill="url(#p{i - 1})"/>' * 20
        + "</pattern>"
        for i in range(1, 9)
    )  # fmt: skip
    bomb = base64.b64encode(png(20_000, 20_000, zlib.compress(b"\0" * 100), depth=1)).decode()
    large = base64.b64encode(png(4000, 4000, zlib.compress(bytes(501 * 4000), 9), depth=1)).decode()
    return {
        "billion_laughs.svg": (
            _svg("<text>&l11;</text>", doctype=f'<!DOCTYPE svg [<!ENTITY l0 "ha">{laughs}]>'),
            "quarantine unreadable_image",
        ),
        "quadratic_entity.svg": (
            _svg("<text>" + "&a;" * 20_000 + "</text>", doctype=f'<!DOCTYPE svg [<!ENTITY a "{"a" * 100_000}">]>'),
            "quarantine unreadable_image",
        ),
        "use_of_use.svg": (_svg(f'<rect id="u0" width="1" height="1"/>{uses}'), "quarantine unsafe_svg"),
        "pattern_of_pattern.svg": (
            _svg(f'<defs>{patterns}</defs><rect width="9" height="9" fill="url(#p8)"/>'), "quarantine unsafe_svg",
        ),
        "embedded_bomb.svg": (_svg(f'<image href="data:image/png;base64,{bomb}"/>'), "quarantine bomb"),
        "deeply_nested.svg": (_svg("<g>" * 50_000 + "</g>" * 50_000), "quarantine unsafe_svg"),
        "too_many_elements.svg": (_svg("<g/>" * 250_000), "quarantine unsafe_svg"),
        "one_picture_a_thousand_times.svg": (
            _svg(f'<image id="i" href="data:image/png;base64,{large}"/>' + '<use xlink:href="#i"/>' * 1000),
            "quarantine unsafe_svg",
        ),
    }  # fmt: skip


def _drawings_that_work() -> Cases:
    """They take long to draw."""
    vertices = "M0 0" + " l1 1" * 20_000
    return {
        "octaves.svg": (
            _svg('<filter id="f"><feTurbulence numOctaves="1000000000"/></filter>'), "quarantine unsafe_svg",
        ),
        "marker_at_every_corner.svg": (
            _svg(
                '<marker id="m"><path d="M0 0h9v9z"/>'
                + '<circle r="3" opacity=".5"/>' * 500
                + f'</marker><path d="{vertices}" marker-mid="url(#m)" fill="none"/>'
            ),
            "quarantine unsafe_svg",
        ),
        "many_filters.svg": (
            _svg(
                '<filter id="f"><feGaussianBlur stdDeviation="40"/></filter>'
                + '<rect width="40" height="40" filter="url(#f)"/>' * 30_000
            ),
            "quarantine unsafe_svg",
        ),
        "many_layers.svg": (
            _svg('<g opacity=".5"><rect width="40" height="40"/></g>' * 60_000), "quarantine unsafe_svg",
        ),
        "endless_dashes.svg": (
            _svg('<path d="M0 0H1000000000" stroke="red" stroke-dasharray=".0000001"/>' * 99), "quarantine unsafe_svg",
        ),
        "inherited_dashes.svg": (
            _svg('<g style="stroke:red;stroke-dasharray:.0001">' + '<path d="M0 0H40"/>' * 200 + "</g>"),
            "quarantine unsafe_svg",
        ),
        "thickened.svg": (
            _svg('<filter id="f"><feMorphology radius="40"/></filter><rect width="40" height="40" filter="url(#f)"/>'),
            "quarantine unsafe_svg",
        ),
        "convolved.svg": (
            _svg(f'<filter id="f"><feConvolveMatrix order="100" kernelMatrix="{"1 " * 10_000}"/></filter>'
                 '<rect width="40" height="40" filter="url(#f)"/>'),
            "quarantine unsafe_svg",
        ),
    }  # fmt: skip


@functools.cache
def picture_cases(canary: str) -> Cases:
    """All of them. Whoever runs what is inside one writes the file `canary`."""
    return {
        **_png_cases(),
        **_other_rasters(),
        **_broken_drawings(),
        **_drawings_that_reach_out(canary),
        **_drawings_that_unfold(),
        **_drawings_that_work(),
    }
