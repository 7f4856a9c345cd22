"""Drawings: what is drawn, what is refused because it reaches out or unfolds, and what is broken."""

from __future__ import annotations

import base64

import pytest
from PIL import Image

from mmlm.features.image import decode_image
from tests.features.test_image import COLOUR, GREY, data, reason

SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="40" height="40">{}</svg>'
)


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
