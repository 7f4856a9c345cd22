"""`generation` beside a question: on the command line, over HTTP, in pieces."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mmlm import cli
from mmlm.features import spec as feature_spec
from mmlm.features.config import TokenizerConfig
from mmlm.features.spec import FeatureSpec, TaskSpec
from mmlm.features.text import train_tokenizer
from mmlm.model.config import ModelConfig
from mmlm.publish.answering import Responder
from mmlm.publish.serve import application
from mmlm.train import weights

TEXTS = ["Say something. 说点什么。 这是七。", "Is it odd or even? odd even 数字"]
SCHEMA = {
    "type": "object", "properties": {"sign": {"enum": ["七", "eight"]}, "sure": {"type": "boolean"}},
    "required": ["sign", "sure"], "additionalProperties": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One task in words, one with classes; nothing learned."""
    shards, folder = tmp_path_factory.mktemp("shards"), tmp_path_factory.mktemp("model")
    words = train_tokenizer(TEXTS * 4, TokenizerConfig(vocab_size=300))
    words.save(shards)
    tasks = [
        TaskSpec(name="say", has_text=True, questions=["Say something."]),
        TaskSpec(name="parity", labels=["even", "odd"], questions=["Is it odd or even?"]),
    ]
    spec = FeatureSpec(vocab_size=words.vocab_size, tokenizer_digest=words.digest, max_len=64, tasks=tasks)
    feature_spec.save(spec, shards)
    torch.manual_seed(0)
    config = ModelConfig(width=32, layers=1, heads=2)
    net = weights.build(config, spec)
    net.answer.weight.data *= 10
    weights.save_model(folder, net.state_dict(), config, shards)
    return folder


@pytest.fixture(scope="module")
def responder(checkpoint: Path) -> Responder:
    return Responder(checkpoint)


def ask(responder: Responder, **generation: Any) -> dict[str, Any]:
    return responder.answer([{"text": "Say something.", "generation": generation}])[0]


def test_without_it_answers_are_what_they_were(responder: Responder) -> None:
    plain = responder.answer([{"text": "Say something."}])[0]
    assert ask(responder) == plain
    assert ask(responder, temperature=0, seed=4) == plain


def test_each_question_has_its_own_and_its_own_seed(responder: Responder) -> None:
    hot = {"temperature": 1.0}
    asked: list[dict[str, Any]] = [
        {**hot, "seed": 1}, {}, {**hot, "seed": 2}, {"choices": ["这是七", "no"]}, {**hot, "seed": 1}, {"max_tokens": 2},
    ]  # fmt: skip
    alone = [ask(responder, **one) for one in asked]
    together = responder.answer([{"text": "Say something.", "generation": one} for one in asked])
    assert [a["answer"] for a in together] == [a["answer"] for a in alone]
    assert alone[0] == alone[4] and alone[0]["answer"] != alone[2]["answer"]
    assert alone[3]["answer"] in ("这是七", "no")


def test_a_task_with_classes_is_answered_in_words_where_choices_ask_for_them(responder: Responder) -> None:
    question = {"text": "Is it odd or even?"}
    plain, held = responder.answer([question, {**question, "generation": {"choices": ["odd", "neither"]}}])
    assert plain["answer"] in ("even", "odd") and plain["answer"] == max(
        plain["label_scores"], key=plain["label_scores"].get
    )
    assert held["answer"] in ("odd", "neither")


def test_json_follows_its_schema_or_the_answer_is_an_error(responder: Responder) -> None:
    assert set(json.loads(ask(responder, json_schema=SCHEMA)["answer"])) == {"sign", "sure"}
    assert "raise generation.max_tokens" in ask(responder, json_schema=SCHEMA, max_tokens=3)["error"]
    assert "cannot be followed" in ask(responder, json_schema={"type": "foo"})["error"]


@pytest.mark.parametrize(
    ("generation", "words"),
    [
        ({"temprature": 1}, "did you mean `temperature`"),
        ({"top_p": 0.5}, "temperature above 0"),
        ({"max_tokens": 10_000}, "at most 64"),
        ("hot", "object"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"json_schema": json.loads('{"items":' * 200 + "{}" + "}" * 200)}, "nested"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_what_is_wrong_is_said(responder: Responder, generation: Any, words: str) -> None:
    (found,) = responder.answer([{"text": "Say something.", "generation": generation}])
    assert words in found["error"]
    assert list(responder.stream({"text": "Say something.", "generation": generation})) == [found]


STREAMED: list[dict[str, Any]] = [
    {},
    {"temperature": 1.2, "seed": 3},
    {"temperature": 1.2, "stop": ["e", "是"]},
    {"beams": 2},
]


@pytest.mark.parametrize("generation", STREAMED, ids=str)
def test_pieces_make_up_the_answer(responder: Responder, generation: dict[str, Any]) -> None:
    *pieces, last = responder.stream({"text": "Say something.", "generation": generation})
    assert last == ask(responder, **generation)
    assert "".join(map(str, pieces)) == last["answer"]  # type: ignore[index]


def test_streams_take_turns_and_a_slow_reader_stops_nobody(responder: Responder) -> None:
    slow = responder.stream({"text": "Say something.", "generation": {"temperature": 1.0}})
    first = next(slow)
    answered: list[Any] = []
    other = threading.Thread(target=lambda: answered.append(ask(responder)), daemon=True)
    other.start()
    other.join(20)
    assert answered, "an unfinished stream keeps the model to itself"
    *pieces, last = slow
    assert "".join([str(first), *map(str, pieces)]) == ask(responder, temperature=1.0)["answer"] == last["answer"]  # type: ignore[index]


@pytest.fixture(scope="module")
def server(responder: Responder) -> Iterator[Any]:
    from starlette.testclient import TestClient

    with TestClient(application(responder, "here")) as client:
        yield client


def test_over_http(server: Any, responder: Responder) -> None:
    body = {"text": "Say something.", "generation": {"temperature": 1.0, "seed": 9}}
    plain = server.post("/predict", json=body)
    assert (plain.status_code, plain.json()) == (200, ask(responder, **body["generation"]))  # type: ignore[arg-type]
    reply = server.post("/predict", json={**body, "stream": True})
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = [json.loads(line.removeprefix("data: ")) for line in reply.text.split("\n\n") if line]
    assert events[-1] == plain.json()
    assert "".join(e["piece"] for e in events[:-1]) == plain.json()["answer"]
    wrongs: list[dict[str, Any]] = [
        {"generation": {"beams": 0}}, {"generation": []}, {"stream": 1}, {"generation": {"seed": -1}, "stream": True},
    ]  # fmt: skip
    for wrong in wrongs:
        reply = server.post("/predict", json={"text": "Say something.", **wrong})
        assert reply.status_code == 422 and reply.json()["error"]


def test_on_the_command_line(checkpoint: Path, responder: Responder, tmp_path: Path, capsys: Any) -> None:
    one = ["predict", "--model", str(checkpoint), "--text", "Say something."]
    hot = ["--set", "generation.temperature=1.0", "--set", "generation.seed=5"]
    assert cli.main([*one, *hot, "--json"]) == 0
    wanted = ask(responder, temperature=1.0, seed=5)
    assert json.loads(capsys.readouterr().out) == wanted
    assert cli.main([*one, *hot, "--stream"]) == 0
    assert capsys.readouterr().out == f"{wanted['answer']}   ({wanted['score']:.3f})\n"
    file = tmp_path / "asked.jsonl"
    rows: list[dict[str, Any]] = [
        {"text": "Say something."},
        {"text": "Say something.", "generation": {"choices": ["七"]}},
    ]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    assert cli.main(["predict", "--model", str(checkpoint), "--input", str(file), *hot]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first == wanted and second["answer"] == "七"
    assert cli.main([*one, "--set", "generation.choices=[yes, no, 1]", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["answer"] in ("yes", "no", "1")
    for wrong in ("generation.top_p=0.5", "generation.heat=1", "train.seed=1"):
        assert cli.main([*one, "--set", wrong]) == 2
        assert "Traceback" not in capsys.readouterr().err
