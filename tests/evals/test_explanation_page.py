"""The page and the pictures of an explanation name the unit of what is explained."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.patches import Rectangle

from mmlm.evals import explain_page, overlays
from mmlm.evals.explain import Explanation, FieldPart, Part, PicturePart, SoundPart, TextPart

PICTURE = PicturePart(np.full((8, 8, 1), 90, np.uint8), np.full((8, 8), 0.01), np.full((2, 2), 0.16))
SOUND = SoundPart(np.zeros((6, 4), np.float16), np.full((6, 4), 0.02), np.full(6, 0.08), 0.01)


@pytest.mark.parametrize(("of", "counted"), [("number", 0), ("label", 1), ("labels", 1), ("text", 1)])
def test_only_log_probabilities_are_nats(of: str, counted: int, tmp_path: Path):
    score = 70.4 if of == "number" else -0.1
    parts: list[Part] = [PICTURE, SOUND, FieldPart("age", 50.0, 0.1), TextPart("old", 1, 0.3), TextPart(" man", 1, 0.2)]
    explained = Explanation("x", of, score, score - 1.72, 0.0, 64, False, parts)
    page = explain_page.write(explained, {"text": "old man"}, tmp_path).read_text()
    assert page.count("nats") == counted * 4  # the difference, two words, and what the full colour stands for
    assert page.count("+1.720") == 1 and ("+0.3000'" in page) != bool(counted)
    drawn = [overlays.picture_figure(PICTURE, explained.unit), overlays.sound_figure(SOUND, explained.unit)]
    written = [
        " ".join([ax.get_title(), ax.get_title(loc="left"), ax.get_xlabel(), ax.get_ylabel()])
        for figure in drawn
        for ax in figure.axes
    ]
    assert sum("nats" in words for words in written) == counted * 4  # patches, pixels, bins, frames
    assert any(words.split(")")[0].endswith(f"sum +0.64{' nats' * counted}") for words in written)


SIGNED = np.array([[1.0, -1.0], [0.0, 0.5]])
ORANGE, BLUE = np.array(overlays.FOR), np.array(overlays.AGAINST)


def far(pixel: np.ndarray, colour: np.ndarray) -> float:
    return float(np.abs(pixel.astype(float) - colour).sum())


def test_colours_of_a_picture_follow_its_attributions():
    """Each patch where it stands: for in orange, against in blue, nothing in grey, the stronger the larger."""
    part = PicturePart(np.full((8, 8, 1), 90, np.uint8), np.kron(SIGNED, np.eye(4)), SIGNED)
    figure = overlays.picture_figure(part, "nats")
    patches, pixels = (np.asarray(axes.images[0].get_array()) for axes in figure.axes[1:3])
    for_, against, nothing, some = (patches[y, x] for y, x in ((1, 1), (1, 6), (6, 1), (6, 6)))
    assert far(for_, ORANGE) < 60 and far(against, BLUE) < 60 and len(set(nothing.tolist())) == 1
    assert far(for_, ORANGE) < far(some, ORANGE) < far(nothing, ORANGE)
    assert all((patches[y : y + 4, x : x + 4] == patches[y, x]).all() for y in (0, 4) for x in (0, 4))
    assert far(pixels[0, 0], ORANGE) < 60 and far(pixels[0, 4], BLUE) < 60 and (pixels[0, 1] == nothing).all()


def test_colours_of_a_sound_follow_its_attributions():
    """Time runs to the right and pitch upwards; a bar for each frame."""
    bins_FM = np.zeros((6, 4))
    bins_FM[1, 3], bins_FM[4, 0] = 1.0, -1.0
    figure = overlays.sound_figure(SoundPart(np.zeros((6, 4), np.float16), bins_FM, bins_FM.sum(1), 0.01), "nats")
    assert figure.axes[1].images[0].origin == "lower"
    over = np.asarray(figure.axes[1].images[0].get_array())
    assert far(over[3, 1], ORANGE) < 60 and far(over[0, 4], BLUE) < 60
    assert len(np.unique(over.reshape(-1, 3), axis=0)) == 3  # and all others alike
    bars = [bar for bar in figure.axes[2].patches if isinstance(bar, Rectangle)]
    assert [bar.get_height() for bar in bars] == [0, 1, 0, 0, -1, 0]
    assert far(np.array(bars[1].get_facecolor()[:3]) * 255, ORANGE) < 1
    assert far(np.array(bars[4].get_facecolor()[:3]) * 255, BLUE) < 1


def test_colours_of_words_follow_their_attributions(tmp_path: Path):
    """On the page and in the terminal."""
    parts: list[Part] = [
        TextPart("good", 1, 0.4),
        TextPart(" bad", 1, -0.4),
        TextPart(" a", 1, 0.0),
        TextPart(" fine", 1, 0.2),
    ]
    explained = Explanation("x", "label", -0.1, -0.3, 0.0, 64, False, parts)
    page = explain_page.write(explained, {"text": "good bad a fine"}, tmp_path).read_text()
    on_page = re.findall(r"background:(#[0-9a-f]{6})' title='[^']*'>([^<]*)<", page)
    shown = explain_page.words(explained)
    in_terminal = [
        (str(span.style).rpartition(" on ")[2], shown.plain[span.start : span.end])
        for span in shown.spans
        if span.style
    ]
    assert on_page == in_terminal and [word for _, word in on_page] == ["good", " bad", " a", " fine"]
    good, bad, nothing, fine = (np.array([int(code[i : i + 2], 16) for i in (1, 3, 5)]) for code, _ in on_page)
    assert (nothing == 255).all() and far(good, ORANGE) < far(fine, ORANGE) < far(nothing, ORANGE)
    assert far(bad, BLUE) < far(nothing, BLUE) and far(bad, BLUE) < far(good, BLUE)
