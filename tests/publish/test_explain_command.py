"""`mmlm explain`: a page, figures and pictures from a checkpoint, or one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from mmlm.cli import main

if TYPE_CHECKING:
    from tests.publish.conftest import World


def test_a_question_becomes_a_page(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(world.checkpoint(0).path)
    question = ["--text", "这是哪个数字？", "--image", str(world.data / "3.png"), "--audio", str(world.data / "3.wav")]
    assert main(["explain", "--model", model, *question, "--out", str(tmp_path), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "explanation.json").read_text())
    assert printed["completeness"]["complete"] and printed["of"] == "label"
    assert "".join(part["text"] for part in printed["parts"] if part["kind"] == "text") == "这是哪个数字？"
    page = (tmp_path / "explanation.html").read_text()
    assert page.count("data:image/png") == 2 and "数" in page and "<script" not in page
    for name in ("0-picture.png", "1-sound.png"):
        assert Image.open(tmp_path / name).size[0] > 400


def test_wrong_questions_get_a_sentence(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(world.checkpoint(0).path)
    assert main(["explain", "--model", model, "--out", str(tmp_path)]) == 2
    assert main(["explain", "--model", model, "--text", "?", "--label", "eleven", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "nothing to explain" in said and "eleven" in said and not list(tmp_path.iterdir())
