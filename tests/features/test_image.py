from __future__ import annotations

import base64
import io
import struct
import zlib
from typing import Literal

import numpy as np
import pytest
from PIL import Image

from mmlm.features.failures import SampleError
from mmlm.features.image import decode_image
from mmlm.features.spec import ImageSpec

GREY = ImageSpec(size=32, patch=8, channels=1)
COLOUR = ImageSpec(size=32, patch=8, channels=3)
SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="40" height="40">{}</svg>'
)


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


def test_svg_is_drawn_on_white() -> None:
    drawing = SVG.format('<rect x="10" y="10" width="20" height="20" fill="#00f"/>')
    pixels = decode_image(drawing.encode(), COLOUR)
    assert tuple(pixels[16, 16]) == (0, 0, 255)
    assert tuple(pixels[1, 1]) == (255, 255, 255)


@pytest.mark.parametrize(
    "size",
    [
        'width="10mm" height="10mm"',
        'width="30pt" height="30pt"',
        'viewBox="0 0 10 10"',
        'width="9999999" height="9999999"',
    ],
)
def test_svg_sizes_in_any_unit(size: str) -> None:
    whole = '<rect width="100%" height="100%" fill="#0f0"/>'
    drawing = f'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" {size}>{whole}</svg>'
    assert (decode_image(drawing.encode(), COLOUR)[1:-1, 1:-1] == (0, 255, 0)).all()  # edges may fall between pixels


def test_an_embedded_picture_is_drawn() -> None:
    inside = base64.b64encode(data(Image.new("RGB", (4, 4), "red"))).decode()
    drawing = SVG.format(f'<image width="40" height="40" xlink:href="data:image/png;base64,{inside}"/>')
    assert (decode_image(drawing.encode(), COLOUR) == (255, 0, 0)).all()


@pytest.mark.parametrize(
    "element",
    [
        "<image width='40' height='40' {}/>",
        "<filter id='f'><feImage {}/></filter><rect width='40' height='40' filter='url(#f)'/>",
    ],
)
@pytest.mark.parametrize("attribute", ["href", "xlink:href"])
def test_an_svg_cannot_read_files(tmp_path, element: str, attribute: str) -> None:
    (tmp_path / "secret.png").write_bytes(data(Image.new("RGB", (40, 40), "red")))
    for link in (tmp_path / "secret.png", f"file://{tmp_path}/secret.png", "secret.png", "data:text/plain,x"):
        assert reason(SVG.format(element.format(f'{attribute}="{link}"')).encode()) == "unsafe_svg"
    entity = f'<!DOCTYPE svg [<!ENTITY x "{tmp_path}/secret.png">]>' + SVG.format(element.format(f'{attribute}="&x;"'))
    assert reason(entity.encode()) == "unsafe_svg"


def test_svgs_that_unfold_without_bound() -> None:
    layers = "".join(f'<g id="g{i}">' + f'<use href="#g{i - 1}"/>' * 10 + "</g>" for i in range(1, 12))
    assert reason(SVG.format(f'<g id="g0"><rect width="1" height="1"/></g>{layers}').encode()) == "unsafe_svg"
    patterns = "".join(
        f'<pattern id="p{i}" width="1" height="1">'
        + f'<rect class="c{i - 1}" width="1" height="1"/>' * 10
        + "</pattern>"
        for i in range(1, 12)
    )
    style = "<style>" + "".join(f".c{i}{{fill:url(#p{i})}}" for i in range(12)) + "</style>"
    assert reason(SVG.format(style + patterns + '<rect class="c11" width="9" height="9"/>').encode()) == "unsafe_svg"
    assert reason(SVG.format("<g>" * 500 + "</g>" * 500).encode()) == "unsafe_svg"
    assert reason(SVG.format('<filter id="f"><feTurbulence numOctaves="100000000"/></filter>').encode()) == "unsafe_svg"
    circle = SVG.format('<g id="a"><use href="#a"/></g><rect width="40" height="40" fill="#000"/>')
    assert (decode_image(circle.encode(), GREY) == 0).all()


def test_broken_svgs_are_typed() -> None:
    assert reason(b"<svg") == "unreadable_image"
    assert reason(b'<svg xmlns="http://www.w3.org/2000/svg" width="0" height="0"/>') == "unreadable_image"
    laughs = (
        '<!DOCTYPE svg [<!ENTITY a0 "ha">'
        + "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 10))
        + "]>"
    )
    assert reason((laughs + SVG.format("<desc>&a9;</desc>")).encode()) == "unreadable_image"
