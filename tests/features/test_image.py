from __future__ import annotations

import hashlib
import io
import itertools
import struct
import subprocess
import sys
import zlib
from typing import Literal

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from mmlm.features import image
from mmlm.features.failures import SampleError
from mmlm.features.image import decode_by_pillow, decode_image
from mmlm.features.spec import ImageSpec

GREY = ImageSpec(size=32, patch=8, channels=1)
COLOUR = ImageSpec(size=32, patch=8, channels=3)


def data(picture: Image.Image, form: str = "PNG", **settings: object) -> bytes:
    out = io.BytesIO()
    picture.save(out, form, **settings)
    return out.getvalue()


def shape(size: int, resize: Literal["pad", "crop", "stretch"]) -> ImageSpec:
    return ImageSpec(size=size, patch=8, channels=3, resize=resize)


def reason(content: bytes, spec: ImageSpec = COLOUR) -> str:
    with pytest.raises(SampleError) as caught:
        decode_image(content, spec)
    return caught.value.reason


def test_a_picture_of_the_right_size_comes_through_untouched() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    np.testing.assert_array_equal(decode_image(data(Image.fromarray(pixels)), COLOUR), pixels)
    np.testing.assert_array_equal(decode_image(data(Image.fromarray(pixels[..., 0])), GREY), pixels[..., :1])


def test_shrinking_by_a_whole_factor_averages() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (128, 128), np.uint8)
    blocks = pixels.reshape(32, 4, 32, 4).mean((1, 3))
    np.testing.assert_allclose(decode_image(data(Image.fromarray(pixels)), GREY)[..., 0], blocks, atol=1)


@pytest.mark.parametrize("side", [5, 31, 33, 100, 777])
def test_a_plain_picture_stays_plain_at_any_size(side: int) -> None:
    np.testing.assert_array_equal(
        decode_image(data(Image.new("RGB", (side, side), (200, 10, 60))), COLOUR), [[[200, 10, 60]] * 32] * 32
    )


def test_resize_modes() -> None:
    wide = Image.new("RGB", (80, 40), "red")
    wide.paste("blue", (0, 0, 20, 40))
    padded, cropped, stretched = (decode_image(data(wide), shape(32, mode)) for mode in ("pad", "crop", "stretch"))
    assert (padded[:8] == 255).all()
    assert (padded[-8:] == 255).all()
    assert tuple(padded[16, 2]) == (0, 0, 255)
    assert (cropped[:, 2:] == (255, 0, 0)).all()
    assert tuple(stretched[0, 3]) == (0, 0, 255)
    assert tuple(stretched[31, 31]) == (255, 0, 0)


def test_transparent_pixels_lie_on_white() -> None:
    clear = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    half = Image.new("LA", (32, 32), (0, 128))
    palette = Image.new("P", (32, 32), 1)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    assert (decode_image(data(clear), COLOUR) == 255).all()
    assert abs(int(decode_image(data(half), GREY)[0, 0, 0]) - 127) <= 1
    assert (decode_image(data(palette), COLOUR) == (0, 255, 0)).all()
    assert (decode_image(data(palette, transparency=1), COLOUR) == 255).all()


def test_sixteen_bits_become_eight() -> None:
    ramp = (np.arange(32 * 32).reshape(32, 32) * 64).astype(np.uint16)
    np.testing.assert_array_equal(decode_image(data(Image.fromarray(ramp)), GREY)[..., 0], ramp >> 8)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK"])
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_formats_and_modes(form: str, mode: str) -> None:
    picture = Image.new("RGB", (50, 50), (255, 255, 255)).convert(mode)
    try:
        content = data(picture, form)
    except (OSError, KeyError, ValueError):
        pytest.skip(f"{form} does not hold {mode}")
    assert decode_image(content, COLOUR).min() >= 250


def test_only_the_first_frame_is_read() -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    content = data(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (decode_image(content, COLOUR) == (255, 0, 0)).all()


def test_the_camera_was_held_upright() -> None:
    picture = Image.new("RGB", (32, 32), "white")
    picture.paste("black", (0, 0, 32, 16))  # dark above
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    turned = decode_image(data(picture, "JPEG", exif=exif, quality=95), GREY)
    assert turned[4, 16, 0] > 200
    assert turned[28, 16, 0] < 50


def header(width: int, height: int) -> bytes:
    """A PNG that announces its size and holds one row."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    ihdr = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", ihdr) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def test_bombs_are_refused_by_their_header() -> None:
    assert reason(header(15_200, 15_200)) == "bomb"  # 231 million pixels
    assert reason(header(9_000, 9_000)) == "bomb"  # 81 million: above ours, below Pillow's limit
    assert reason(header(2**31 - 1, 2**31 - 1)) == "bomb"


def test_broken_pictures_are_typed() -> None:
    whole = data(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)))
    assert reason(b"") == "unreadable_image"
    assert reason(b"not a picture") == "unreadable_image"
    assert reason(b"\x89PNG broken") == "unreadable_image"
    assert reason(whole[: len(whole) // 2]) == "unreadable_image"
    assert reason(data(Image.new("RGB", (8, 8)), "PPM")) == "unreadable_image"


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Something with large shapes and fine grain, (H, W, 3) uint8."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (max(2, height // 40), max(2, width // 40), 3), np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return np.clip(smooth + rng.integers(-9, 10, smooth.shape), 0, 255).astype(np.uint8)


def see_through(pixels: np.ndarray) -> Image.Image:
    """`pixels` with an alpha channel that is neither 0 nor 255 nearly everywhere."""
    return Image.fromarray(np.dstack([pixels, pixels[..., 1][::-1]]))


FILES = {
    "jpeg": lambda p: data(Image.fromarray(p), "JPEG", quality=90),
    "jpeg 4:4:4": lambda p: data(Image.fromarray(p), "JPEG", quality=95, subsampling=0),
    "progressive jpeg": lambda p: data(Image.fromarray(p), "JPEG", quality=85, progressive=True),
    "grey jpeg": lambda p: data(Image.fromarray(p[..., 0]), "JPEG"),
    "png": lambda p: data(Image.fromarray(p)),
    "grey png": lambda p: data(Image.fromarray(p[..., 0])),
    "webp": lambda p: data(Image.fromarray(p), "WEBP", quality=80),
    "lossless webp": lambda p: data(Image.fromarray(p), "WEBP", lossless=True),
    "webp with alpha": lambda p: data(see_through(p), "WEBP", quality=80),
    "lossless webp with alpha": lambda p: data(see_through(p), "WEBP", lossless=True),
}


@pytest.mark.parametrize("resize", ["pad", "crop", "stretch"])
@pytest.mark.parametrize("shape_of", [(64, 64), (40, 333), (301, 200), (700, 700), (20, 20)])
@pytest.mark.parametrize("form", FILES)
def test_the_fast_way_and_pillow_agree(
    form: str, shape_of: tuple[int, int], resize: Literal["pad", "crop", "stretch"]
) -> None:
    """To the last bit: libjpeg-turbo, libpng and libwebp are behind both."""
    content = FILES[form](photo(*shape_of))
    for channels in (1, 3):
        spec = ImageSpec(size=32, patch=8, channels=channels, resize=resize)
        fast, slow = decode_image(content, spec), decode_by_pillow(content, spec)
        assert fast.shape == (32, 32, channels)
        np.testing.assert_array_equal(fast, slow)


@pytest.mark.parametrize("resize", ["pad", "crop", "stretch"])
def test_reduced_jpegs_look_as_if_all_of_it_was_averaged(resize: Literal["pad", "crop", "stretch"]) -> None:
    """Against Pillow's box filter over the whole picture: one level on average, 8 levels anywhere."""
    picture = Image.fromarray(photo(640, 960))
    content = data(picture, "JPEG", quality=92)
    whole = Image.open(io.BytesIO(content)).convert("RGB")
    if resize == "crop":
        whole = whole.crop((160, 0, 800, 640))
    size = (32, 21) if resize == "pad" else (32, 32)
    wanted = np.asarray(whole.resize(size, Image.Resampling.BOX)).astype(int)
    found = decode_image(content, shape(32, resize)).astype(int)
    difference = abs((found[5:26] if resize == "pad" else found) - wanted)
    assert difference.mean() < 1
    assert difference.max() <= 8


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_all_eight_orientations(form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = photo(48, 80)
    settings = {"quality": 95, "subsampling": 0} if form == "JPEG" else {"lossless": True} if form == "WEBP" else {}
    content = data(Image.fromarray(pixels), form, exif=exif, **settings)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    wanted = decode_image(data(upright.convert("RGB")), COLOUR).astype(int)
    assert abs(decode_image(content, COLOUR).astype(int) - wanted).max() <= 1
    assert (upright.size == (80, 48)) == (orientation < 5)


def swapped_profile() -> bytes:
    """sRGB whose red and blue primaries are exchanged: what it calls red is blue."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for number in range(struct.unpack_from(">I", profile, 128)[0]):
        at = 132 + 12 * number
        profile[at : at + 4] = {b"rXYZ": b"bXYZ", b"bXYZ": b"rXYZ"}.get(
            bytes(profile[at : at + 4]), profile[at : at + 4]
        )
    return bytes(profile)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_colour_profiles_are_applied(form: str) -> None:
    picture = Image.new("RGB", (200, 100), (250, 20, 20))
    settings = {"lossless": True} if form == "WEBP" else {"quality": 95} if form == "JPEG" else {}
    red, green, blue = decode_image(data(picture, form, icc_profile=swapped_profile(), **settings), COLOUR)[16, 16]
    assert (red < 60, green < 60, blue > 200) == (True, True, True)
    assert decode_image(data(picture, form, icc_profile=swapped_profile(), **settings), COLOUR)[0, 0].min() == 255
    grey = decode_image(data(picture, form, icc_profile=swapped_profile(), **settings), GREY)
    plain = decode_image(data(picture, form, **settings), GREY)
    assert int(grey[16, 16, 0]) < int(plain[16, 16, 0]) - 30  # blue is darker than red


def test_profiles_that_change_nothing_or_make_no_sense_are_ignored() -> None:
    picture = Image.fromarray(photo(100, 100))
    plain = decode_image(data(picture, "JPEG"), COLOUR)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (srgb, b"rubbish" * 30, srgb[: len(srgb) // 2], srgb[:128]):
        np.testing.assert_array_equal(decode_image(data(picture, "JPEG", icc_profile=profile), COLOUR), plain)
    grey = data(picture.convert("L"), "JPEG", icc_profile=swapped_profile())  # of colours, on a grey picture
    np.testing.assert_array_equal(decode_image(grey, GREY), decode_image(data(picture.convert("L"), "JPEG"), GREY))


def grey_profile(gamma: float) -> bytes:
    """A grey ICC profile (version 2) of white D50 with one gamma: header, white point, curve, name."""

    def tag(kind: bytes, content: bytes) -> bytes:
        return kind + bytes(4) + content + bytes(-len(content) % 4)

    white = tag(b"XYZ ", struct.pack(">iii", 63190, 65536, 54061))
    curve = tag(b"curv", struct.pack(">IH", 1, round(gamma * 256)))
    name = tag(b"desc", struct.pack(">I", 2) + b"g\0" + bytes(78))
    blocks, at = [(b"wtpt", white), (b"kTRC", curve), (b"desc", name)], 128 + 4 + 36
    table, body = struct.pack(">I", 3), b""
    for kind, block in blocks:
        table += kind + struct.pack(">II", at + len(body), len(block))
        body += block
    head = struct.pack(">I4sI4s4s4s", at + len(body), b"lcms", 0x02100000, b"mntr", b"GRAY", b"XYZ ")
    head += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + struct.pack(">iii", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + table + body


def test_grey_profiles_are_applied() -> None:
    picture = Image.new("L", (64, 64), 128)
    found = decode_image(data(picture, "PNG", icc_profile=grey_profile(1.0)), GREY)[5, 5, 0]
    assert abs(int(found) - 188) <= 2  # half the light is 188 of 255 in sRGB (IEC 61966-2-1)
    assert decode_image(data(picture, "JPEG", icc_profile=grey_profile(1.0)), COLOUR).shape == (32, 32, 3)


def test_cmyk_with_adobe_mark_and_progressive() -> None:
    ink = Image.new("CMYK", (64, 64), (255, 0, 0, 0))  # cyan
    for settings in ({}, {"progressive": True}, {"icc_profile": swapped_profile()}):
        red, green, blue = decode_image(data(ink, "JPEG", quality=95, **settings), COLOUR)[16, 16]
        assert (red < 30, green > 150, blue > 200) == (True, True, True)
    assert decode_image(data(ink, "TIFF"), COLOUR)[0, 0, 0] < 30


def png16(values: np.ndarray) -> bytes:
    """(H, W, C) uint16 as a PNG of 16 bits a channel, which Pillow does not write."""
    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_sixteen_bits_a_channel(channels: int) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (32, 32, channels), np.uint16)
    if channels in (2, 4):
        values[..., -1] = 65535
    found = decode_image(png16(values), COLOUR)
    colours = values[..., : channels - 1] if channels in (2, 4) else values
    np.testing.assert_array_equal(found, np.broadcast_to(colours >> 8, found.shape))


def outcome(content: bytes) -> str:
    try:
        decode_image(content, COLOUR)
    except SampleError as error:
        return error.reason
    return "decoded"


def test_damage_never_passes_for_a_picture() -> None:
    """Every cut of a file is refused, or gives what Pillow gives; no damage stops the work."""
    rng = np.random.default_rng(5)
    seen = set()
    for form in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
        whole = data(Image.fromarray(photo(64, 64)), form)
        assert reason(whole[: len(whole) // 2]) == "unreadable_image"
        for _ in range(40):
            broken = bytearray(whole)
            broken[rng.integers(len(broken))] ^= 1 << rng.integers(8)
            seen.add(outcome(bytes(broken)))
    assert seen <= {"decoded", "unreadable_image", "bomb"}


def jpeg_of(width: int, height: int, scans: int) -> bytes:
    """A progressive JPEG that announces this size and repeats its scans."""
    whole = bytearray(data(Image.fromarray(photo(64, 64)), "JPEG", progressive=True))
    frame = whole.index(b"\xff\xc2")
    whole[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    scan = whole.index(b"\xff\xda")
    return bytes(whole[:-2] + whole[scan:-2] * scans + whole[-2:])


def test_jpegs_that_announce_too_much() -> None:
    assert reason(jpeg_of(65_000, 65_000, 1)) == "bomb"
    assert reason(jpeg_of(7_000, 7_000, 50)) == "bomb"  # 49 million pixels, hundreds of times


def test_a_line_of_pixels_may_be_long() -> None:
    line = Image.new("L", (60_000, 1), 9)
    for resize in ("pad", "crop", "stretch"):
        assert decode_image(data(line), shape(32, resize)).shape == (32, 32, 3)  # type: ignore[arg-type]


def test_the_same_bytes_in_another_process() -> None:
    content = data(Image.fromarray(photo(500, 400)), "JPEG", quality=88)
    code = (
        "import sys, hashlib; from mmlm.features.image import decode_image; from mmlm.features.spec import ImageSpec;"
        "print(hashlib.sha256(decode_image(sys.stdin.buffer.read(), ImageSpec(size=48, patch=8, channels=3))).hexdigest())"
    )
    there = subprocess.run([sys.executable, "-c", code], input=content, capture_output=True, check=True).stdout
    here = [
        hashlib.sha256(decode_image(content, ImageSpec(size=48, patch=8, channels=3)).tobytes()).hexdigest()
        for _ in range(3)
    ]
    assert {there.decode().strip(), *here} == {here[0]}


@pytest.mark.parametrize(("width", "height"), [(1024, 512), (1021, 517), (300, 4000), (5000, 90)])
def test_large_pictures_shrunk_in_bands_look_as_if_all_of_it_was_averaged(
    width: int, height: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the band; and transparent ones (by Pillow) as those that were laid on white before (by OpenCV)."""
    rng, spec = np.random.default_rng(12), ImageSpec(size=48, patch=16, channels=3)
    rough = Image.fromarray(rng.integers(0, 256, (2 + height // 80, 2 + width // 80, 4), np.uint8))
    picture = rough.resize((width, height), Image.Resampling.BICUBIC)
    white = Image.new("RGBA", picture.size, "white")
    white.alpha_composite(picture)
    whole = decode_image(data(white.convert("RGB"), "PNG"), spec).astype(int)
    inner = [max(1, round(side * 48 / max(width, height))) for side in (width, height)]
    averaged = np.full((48, 48, 3), 255.0)
    left, top = (48 - inner[0]) // 2, (48 - inner[1]) // 2
    averaged[top : top + inner[1], left : left + inner[0]] = white.convert("RGB").resize(inner, Image.Resampling.BOX)
    assert np.abs(whole - averaged).mean() < 3
    assert np.abs(decode_image(data(picture, "PNG"), spec) - whole).max() <= 1
    monkeypatch.setattr(image, "BAND", 20_000)
    np.testing.assert_array_equal(decode_image(data(white.convert("RGB"), "PNG"), spec), whole)


def test_a_large_transparent_picture_takes_little_more_memory_than_its_pixels() -> None:
    """36 million pixels are 144 MB as RGBA; flattened and shrunk whole, they took 810."""
    code = """
import re, sys
from mmlm.features.image import decode_image
from mmlm.features.spec import ImageSpec
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1024
sent, spec = sys.stdin.buffer.read(), ImageSpec(size=224, patch=16, channels=3)
decode_image(sent[-int(sys.argv[1]):], spec)
before = peak()
decode_image(sent[:-int(sys.argv[1])], spec)
print(peak() - before)
"""
    large, small = (data(Image.new("RGBA", (side, side), (10, 200, 30, 100))) for side in (6000, 600))
    done = subprocess.run(
        [sys.executable, "-c", code, str(len(small))], input=large + small, capture_output=True, check=True
    )
    assert 100 < int(done.stdout) < 230


def ink_profile() -> bytes:
    """A press that prints red where cyan is wanted, and each other ink as its name says; paper is white (ICC.1:2010, 10.8:
    four inks to Lab by a table of 8 bits with two nodes a channel)."""
    lab = {
        "white": (100, 0, 0),
        "red": (54, 81, 70),
        "magenta": (60, 93, -61),
        "yellow": (97, -16, 93),
        "black": (0, 0, 0),
    }

    def node(inks: tuple[int, ...]) -> tuple[int, int, int]:
        names = [n for n, on in zip(("red", "magenta", "yellow", "black"), inks, strict=True) if on]
        return lab["black" if "black" in names or len(names) > 2 else names[0] if names else "white"]

    table = bytearray(
        b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    )
    table += bytes(range(256)) * 4
    for inks in itertools.product((0, 1), repeat=4):
        lightness, a, b = node(inks)
        table += bytes([round(lightness * 2.55), a + 128, b + 128])
    table += bytes(range(256)) * 3
    white = b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061)
    tags = [(b"A2B0", bytes(table)), (b"wtpt", white)]
    body, entries, at = b"", b"", 128 + 4 + 12 * len(tags)
    for name, content in tags:
        entries += name + struct.pack(">II", at + len(body), len(content))
        body += content.ljust(-(-len(content) // 4) * 4, b"\0")
    head = struct.pack(">I4sI4s4s4s", at + len(body), b"lcms", 0x02400000, b"prtr", b"CMYK", b"Lab ")
    head = head.ljust(36, b"\0") + b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + entries + body


@pytest.mark.parametrize("form", ["JPEG", "TIFF"])
def test_the_colours_of_a_press_are_those_that_its_profile_tells(form: str) -> None:
    cyan, yellow, paper = ((255, 0, 0, 0), (0, 0, 255, 0), (0, 0, 0, 0))
    picture = Image.new("CMYK", (96, 32), paper)
    picture.paste(cyan, (0, 0, 32, 32))
    picture.paste(yellow, (32, 0, 64, 32))
    settings = {"quality": 95, "subsampling": 0} if form == "JPEG" else {}
    spec = ImageSpec(size=96, patch=8, channels=3, resize="stretch")
    for given, first in ((ink_profile(), (255, 0, 0)), (None, (0, 255, 255))):
        content = data(picture, form, **settings, **({"icc_profile": given} if given else {}))
        for decode in (decode_image, decode_by_pillow):
            found = decode(content, spec).astype(int)
            for at, wanted in ((16, first), (48, (255, 255, 0)), (80, (255, 255, 255))):
                assert abs(found[48, at] - wanted).max() <= 60, (form, given is not None, at, found[48, at])
            assert (found[48, 16].argmax() == 0) == (given is not None)
    # a profile of another kind of picture, or a broken one, is as none
    for odd in (swapped_profile(), ink_profile()[:400], b"x" * 200):
        assert decode_image(data(picture, form, **settings, icc_profile=odd), spec)[48, 16].argmax() != 0
