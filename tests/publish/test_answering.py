"""Questions of people, good and bad."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from fastapi.testclient import TestClient

from mmlm.cli import main
from mmlm.errors import ArtifactError
from mmlm.publish.answering import Responder, route
from mmlm.publish.asked_media import media_bytes, missing
from mmlm.publish.serve import application

if TYPE_CHECKING:
    from tests.publish.conftest import World


@pytest.fixture(scope="module")
def responder(world: World) -> Responder:
    return Responder.load(world.checkpoint(0).path)


def test_any_combination_is_answered_in_order(responder: Responder, world: World) -> None:
    rows: list[dict[str, Any]] = [
        {"text": "Which number is it?", "image": str(world.data / "3.png"), "audio": str(world.data / "3.wav")},
        {"image": (world.data / "3.png").read_bytes()},
        {"text": "这是哪个数字？", "audio": world.sound(500)},
        {"text": "Which number is it?"},
    ]
    together = responder.answer(rows)
    assert all(set(a) == {"answer", "score", "label_scores"} for a in together)
    assert all(sum(a["label_scores"].values()) == pytest.approx(1, abs=1e-5) for a in together)
    alone = [responder.answer([row])[0] for row in rows]
    assert [a["answer"] for a in alone] == [a["answer"] for a in together]
    assert len({round(a["score"], 6) for a in together}) == 4, "what is given makes no difference"


def test_a_picture_without_a_question_is_asked_the_usual_one(responder: Responder, world: World) -> None:
    asked = responder.answer([{"image": world.picture(9), "text": "Which number is it?"}])
    assert asked == responder.answer([{"image": world.picture(9)}])


def test_a_bad_row_gets_a_sentence_and_the_others_an_answer(responder: Responder, world: World, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    (tmp_path / "none.wav").write_bytes(world.sound(1, 0))
    rows: list[dict[str, Any]] = [
        {"text": "?", "image": str(tmp_path / "gone.png")},
        {"text": "?", "image": str(tmp_path / "bad.png")},
        {"text": "?", "audio": str(tmp_path / "none.wav")},
        {},
        {"txt": "?"},
        {"text": 7},
        {"text": "x" * 5000},
        {"text": "?", "image": 7},
        {"text": "Which number is it?"},
    ]
    found = responder.answer(rows)
    assert [("error" in a) for a in found] == [True] * 8 + [False]
    for answer, words in zip(found, ["no file", "", "", "nothing", "txt", "int", "tokens", "int"], strict=False):
        assert words in answer["error"]
        assert "Traceback" not in answer["error"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"imgae": "3.png"},
            "unknown field `imgae` (did you mean `image`?); known: text, image, audio, fields, adapter",
        ),
        ({"generaton": {"temperature": 0.5}}, "unknown field `generaton` (did you mean `generation`?)"),
        ({"digit": 7, "Text": "4"}, "unknown field `Text` (did you mean `text`?), `digit`; known: text"),
    ],
)
def test_a_misspelt_key_is_refused_and_not_left_out(
    row: dict[str, Any], said: str, responder: Responder, world: World, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    question = {"text": "Which number is it?", **row}
    assert said in responder.answer([question])[0]["error"]
    (streamed,) = responder.stream(question)
    assert isinstance(streamed, dict) and said in streamed["error"]
    asked = tmp_path / "asked.jsonl"
    asked.write_text(json.dumps(question) + "\n" + json.dumps({"text": "Which number is it?"}) + "\n")
    assert main(["predict", "--model", str(world.checkpoint(0).path), "--input", str(asked)]) == 2
    refused, answered = map(json.loads, capsys.readouterr().out.splitlines())
    assert said in refused["error"] and answered["answer"]
    reply = TestClient(application(responder, "m")).post("/predict", json=question)
    assert reply.status_code == 422 and said.partition(";")[0] in reply.json()["error"]


def test_without_paths_a_path_is_no_picture(responder: Responder, world: World) -> None:
    path = str(world.data / "3.png")
    assert "base64" in responder.answer([{"image": path}], paths=False)[0]["error"]
    coded = base64.b64encode(Path(path).read_bytes()).decode()
    by_bytes = responder.answer([{"image": Path(path).read_bytes()}], paths=False)
    for text in (
        coded,
        "data:image/png;base64," + coded,
        "\n".join(coded[i : i + 76] for i in range(0, len(coded), 76)),
    ):
        assert responder.answer([{"image": text}], paths=False) == by_bytes


def test_a_question_finds_its_task(responder: Responder, world: World) -> None:
    for question, task in {
        "Which number is it?": "digit", "WHICH  number is it？": "digit", "是哪个数字": "digit",
        "Is the tone high or low?": "tone", "Tone: high, or low?": "tone", "zzz": "digit", "": "digit",
    }.items():  # fmt: skip
        assert route(question, responder.spec).name == task, question
    assert set(
        responder.answer([{"text": "high tone or low tone?", "audio": world.sound(440)}])[0]["label_scores"]
    ) == {
        "high",
        "low",
    }


def test_what_is_missing() -> None:
    assert all(missing(v) for v in (None, float("nan"), "", b""))
    assert not any(missing(v) for v in ("a", b"a", 0, 1.5))
    assert media_bytes(memoryview(b"ab"), "sound", False) == b"ab"


def test_no_model_there(world: World, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for model in (str(tmp_path / "gone"), str(tmp_path / "empty"), "models:/nosuch@champion"):
        with pytest.raises(ArtifactError):
            Responder.load(model, tracking_uri=f"sqlite:///{tmp_path}/none.db")
    assert not (tmp_path / "none.db").exists(), "asking for a model made a registry"
