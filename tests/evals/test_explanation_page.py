"""The page and the pictures of an explanation name the unit of what is explained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

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
