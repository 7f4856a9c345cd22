"""Chat messages as questions: what is asked is, token by token, what a record of the same messages was trained on."""

from __future__ import annotations

import base64
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmlm.cli import main
from mmlm.config import parse
from mmlm.corpus.config import ScanConfig
from mmlm.corpus.scan import scan
from mmlm.features import spec as feature_spec
from mmlm.model.config import ModelConfig
from mmlm.publish.answering import Responder
from mmlm.shards.codec import unpack
from mmlm.shards.config import ShardConfig
from mmlm.shards.shard import shard
from mmlm.train import weights
from tests.publish.conftest import picture, sound

ASK, ANSWER = "Which of them is it?", {"role": "assistant", "content": "the second"}
LINES: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": [{"type": "image", "image": "10.png"}, {"type": "text", "text": "What is this?"}]},
            {"role": "assistant", "content": "a square"},
            {"role": "user", "content": [
                {"type": "text", "text": "And these?"}, {"type": "image_url", "image_url": {"url": "90.png"}},
                {"type": "image", "path": "210.png"}, {"type": "audio", "audio": "300.wav"},
                {"type": "text", "text": ASK},
            ]},
        ]
    },
    {"conversations": [{"from": "human", "value": f"<image>\nor\n<image>? {ASK}"}], "images": ["210.png", "10.png"]},
    {"messages": [{"role": "user", "content": ASK}], "images": ["90.png", "10.png"], "audios": ["600.wav", "300.wav"]},
    {"messages": [{"role": "user", "content": ASK}]},
]  # fmt: skip


@pytest.fixture(scope="module", params=["plain", "chatml"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(raw data, shards, an untrained model of them)."""
    out = tmp_path_factory.mktemp("chat")
    data = out / "raw"
    data.mkdir()
    for shade in (10, 90, 210):
        (data / f"{shade}.png").write_bytes(picture(shade))
    for hertz in (300, 600):
        (data / f"{hertz}.wav").write_bytes(sound(hertz))
    rows = [
        {**line, "id": f"t{n}", "split": "train", key: [*line[key], ANSWER]}
        for n, line in enumerate(LINES)
        for key in line.keys() & {"messages", "conversations"}
    ]
    (data / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"sources": [{"kind": "chat", "files": "talks.jsonl"}]}
    manifest = scan(parse(ScanConfig, source, "test"), data=data, out=out / "manifest", tracker=None)
    features = {
        "tokenizer": {"vocab_size": 300}, "max_len": 512, "image": {"size": 16, "patch": 8, "channels": 1},
        "audio": {"max_seconds": 0.2, "n_mels": 8}, "chat_template": request.param,
    }  # fmt: skip
    config = parse(ShardConfig, {"features": features, "ray_from": 10**9}, "test")
    shards = shard(config, manifest, data=data, out=out / "shards", workers=1, tracker=None).path
    torch.manual_seed(0)
    model = ModelConfig(width=16, layers=1, heads=2)
    (out / "model").mkdir()
    net = weights.build(model, feature_spec.load(shards))
    weights.save_model(out / "model", net.state_dict(), model, shards)
    return data, shards, out / "model"


def test_messages_are_read_as_those_of_the_corpus(
    made: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, shards, model = made
    stored: dict[str, dict[str, bytes]] = {}
    for path in shards.glob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, ending = member.name.partition(".")
                stored.setdefault(key, {})[ending] = tar.extractfile(member).read()  # type: ignore[union-attr]
    trained = {sample.id: sample for sample in map(unpack, stored.values())}
    monkeypatch.chdir(data)  # where paths of a question start
    responder = Responder(model)
    assert [len(trained[f"t{n}"].images) for n in range(4)] == [3, 2, 2, 0]
    for n, line in enumerate(LINES):
        asked, known = responder.sample(line), trained[f"t{n}"]
        assert asked.tokens.tolist() == known.tokens[: known.answer_at + 1].tolist()
        assert all(map(np.array_equal, [*asked.images, *asked.sounds], [*known.images, *known.sounds]))
        key = "messages" if "messages" in line else "conversations"
        with_answer = {**line, key: [*line[key], ANSWER]}  # as a line of the test split has it
        assert responder.sample(with_answer).tokens.tolist() == asked.tokens.tolist()
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    assert main(["predict", "--model", str(model), "--input", str(tmp_path / "asked.jsonl")]) == 0
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert said == responder.answer(LINES) and said[3] == responder.answer([{"text": ASK}])[0]
    coded = base64.b64encode((data / "10.png").read_bytes()).decode()
    for image in ({"data": coded}, {"url": f"data:image/png;base64,{coded}"}, {"path": str(data / "10.png")}):
        line = {"messages": [{"role": "user", "content": [{"type": "image", **image}, {"type": "text", "text": ASK}]}]}
        assert responder.answer([line]) == responder.answer([{"image": str(data / "10.png"), "text": ASK}])


def test_messages_that_say_nothing_get_a_sentence(made: tuple[Path, Path, Path]) -> None:
    responder = Responder(made[2])
    user = {"role": "user", "content": ASK}
    for line, said in (
        ({"messages": [user], "text": ASK}, "unknown field `text`"),
        ({"messages": [user], "task": "nobody's"}, 'no task "nobody\'s"; wanted '),
        ({"messages": [{**user, "content": [{"type": "fields", "fields": {"age": 1}}]}]}, "this model takes no fields"),
        ({"messages": None, "conversations": [{"role": "nobody", "content": ASK}]}, "role 'nobody'"),
        ({"messages": [user], "imagse": []}, "unknown field `imagse` (did you mean `image`?)"),
        ({"messages": [user], "image": ["gone.png"]}, "gone.png"),
        ({"messages": [{"role": "nobody", "content": ASK}]}, "the messages cannot be read: role 'nobody'; wanted user"),
        ({"messages": ASK}, "the messages cannot be read: neither `messages` nor `conversations`"),
        ({"messages": [ANSWER]}, "nothing is asked; wanted a message with a text"),
        (
            {"messages": [{**user, "content": "<image>"}], "images": []},
            "the messages cannot be read: a place for image",
        ),
        ({"messages": [{**user, "content": [{"type": "image"}]}]}, "the messages cannot be read: a place for image"),
        ({"messages": [{**user, "content": [{"type": "video", "path": "a.mp4"}]}]}, "this model takes no videos"),
        ({"messages": [{**user, "content": [{"type": "image", "image": {"of": 1}}]}]}, "no picture in ['of']; wanted"),
    ):
        answer = responder.answer([line])[0]
        assert said in answer.get("error", ""), (line, answer)
    one = {"messages": [{**user, "content": [{"type": "image", "image": "10.png"}]}]}
    assert "not base64" in responder.answer([one], paths=False)[0]["error"]
