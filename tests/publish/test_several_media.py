"""Several pictures and sounds in one question, whose answer depends on their order: from a table to answers."""

from __future__ import annotations

import base64
import io
import json
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from mmlm.cli import main
from mmlm.config import parse
from mmlm.corpus.config import ScanConfig
from mmlm.corpus.scan import scan
from mmlm.features.sample import Sample
from mmlm.launch.local import ranks
from mmlm.publish import bundle
from mmlm.publish.answering import Responder
from mmlm.publish.locate import fluent
from mmlm.publish.serve import application
from mmlm.shards.codec import unpack
from mmlm.shards.config import ShardConfig
from mmlm.shards.shard import shard
from mmlm.tracking import NullTracker
from mmlm.train.config import TrainConfig
from mmlm.train.train import train
from tests.publish.conftest import picture, sound

QUESTION = "Which picture is brighter?"
SCAN = {
    "sources": [
        {
            "kind": "table", "files": "pairs.jsonl",
            "map": {"id": "id", "split": "split", "image": "pictures", "audio": "sounds", "many": "all"},
            "ask": [{"task": "brighter", "question": QUESTION, "label": "brighter"}],
        }
    ]
}  # fmt: skip
FEATURES = {
    "tokenizer": {"vocab_size": 300}, "max_len": 64, "image": {"size": 16, "patch": 16, "channels": 1, "scale": "fixed"},
    "audio": {"max_seconds": 0.2, "n_mels": 8},
}  # fmt: skip
TRAIN = {
    "steps": 100, "log_every": 50, "save_every": 100, "model": {"width": 32, "layers": 2, "heads": 2}, "precision": "fp32",
    "data": {"batch": 32}, "optimizer": {"lr": 1e-2},
}  # fmt: skip


class Made(NamedTuple):
    data: Path
    """The folder of the media."""
    samples: dict[str, Sample]
    """As the shards have them, by id."""
    model: Path

    def asked(self, row: dict[str, Any]) -> dict[str, Any]:
        """The question of a row of the table, its media as paths."""
        return {
            "text": QUESTION, "image": [str(self.data / name) for name in row["pictures"]],
            "audio": [str(self.data / name) for name in row["sounds"]],
        }  # fmt: skip


def rows(count: int = 200) -> list[dict[str, Any]]:
    """A dark and a bright picture, named by their shades, in either order, and two of three sounds, which say nothing."""
    rng, made = np.random.default_rng(0), []
    for n in range(count):
        first, second = rng.permutation([10 + 20 * rng.integers(5), 150 + 20 * rng.integers(5)])
        hertz = rng.choice([300, 600, 1200], 2, replace=False)
        made.append(
            {
                "id": f"p{n}", "split": "test" if n % 5 == 0 else "train", "pictures": [f"{first}.png", f"{second}.png"],
                "sounds": [f"{h}.wav" for h in hertz], "brighter": "first" if first > second else "second",
            }
        )  # fmt: skip
    return made


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    out = tmp_path_factory.mktemp("several")
    data = out / "raw"
    data.mkdir()
    for shade in range(10, 250, 20):
        (data / f"{shade}.png").write_bytes(picture(shade))
    for hertz in (300, 600, 1200):
        (data / f"{hertz}.wav").write_bytes(sound(hertz))
    (data / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    manifest = scan(parse(ScanConfig, SCAN, "test"), data=data, out=out / "manifest", tracker=None)
    config = parse(ShardConfig, {"features": FEATURES, "ray_from": 10**9}, "test")
    shards = shard(config, manifest, data=data, out=out / "shards", workers=1, tracker=None)
    model = train(parse(TrainConfig, TRAIN, "test"), shards, out=out / "model", launch=ranks(1), tracker=NullTracker())
    stored: dict[str, dict[str, bytes]] = {}
    for path in shards.path.glob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, ending = member.name.partition(".")
                stored.setdefault(key, {})[ending] = tar.extractfile(member).read()  # type: ignore[union-attr]
    return Made(data, {s.id: s for s in map(unpack, stored.values())}, model.path)


def test_what_is_asked_is_what_was_trained_on(made: Made) -> None:
    responder = Responder(made.model)
    for row in rows()[:20]:
        asked, trained = responder.sample(made.asked(row)), made.samples[row["id"]]
        assert len(trained.images) == len(trained.sounds) == 2
        assert asked.tokens.tolist() == trained.tokens[: trained.answer_at + 1].tolist()
        for kind in ("images", "sounds"):
            for one, other in zip(getattr(asked, kind), getattr(trained, kind), strict=True):
                assert np.array_equal(one, other)


def test_the_command_answers_by_the_order_of_pictures(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    test = [row for row in rows() if row["split"] == "test"]
    lines = tmp_path / "asked.jsonl"
    lines.write_text("".join(json.dumps(made.asked(row)) + "\n" for row in test))
    assert main(["predict", "--model", str(made.model), "--input", str(lines)]) == 0
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert np.mean([answer["answer"] == row["brighter"] for answer, row in zip(said, test, strict=True)]) > 0.9
    dark, bright = (str(made.data / f"{shade}.png") for shade in (30, 210))
    high, low = (str(made.data / f"{hertz}.wav") for hertz in (1200, 300))
    for first, second, wanted in ((dark, bright, "second"), (bright, dark, "first")):
        given = ["--image", first, "--audio", high, "--image", second, "--audio", low]
        assert main(["predict", "--model", str(made.model), "--text", QUESTION, *given, "--json"]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert answer["answer"] == wanted
        row = {"text": QUESTION, "image": [first, second], "audio": [high, low]}
        assert [answer] == Responder(made.model).answer([row])


def test_the_server_takes_lists_of_base64(made: Made) -> None:
    client = TestClient(application(responder := Responder(made.model), "m"))

    def coded(row: dict[str, Any]) -> dict[str, Any]:
        return {
            key: [base64.b64encode(Path(one).read_bytes()).decode() for one in row[key]] for key in ("image", "audio")
        }

    for row in map(made.asked, rows()[:6]):
        reply = client.post("/predict", json={**row, **coded(row)})
        assert reply.status_code == 200 and [reply.json()] == responder.answer([row])
    row = made.asked(rows()[0])
    reply = client.post("/predict", json={**row, **coded(row), "image": [coded(row)["image"][0], row["image"][1]]})
    assert reply.status_code == 422 and "the picture 2 of 2 is not base64" in reply.json()["error"]


def test_the_registered_model_takes_lists_in_a_table(made: Made, tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    with fluent(f"sqlite:///{tmp_path}/mlflow.db") as mlflow:
        experiment = mlflow.create_experiment("b", artifact_location=(tmp_path / "artifacts").as_uri())
        with mlflow.start_run(experiment_id=experiment):
            example = pd.DataFrame([{"text": QUESTION}])
            info = bundle.log(mlflow, made.model, tmp_path / "code", example=example, metadata={})
        model = mlflow.pyfunc.load_model(info.model_uri)
    asked = [made.asked(row) for row in rows()[:6]]
    wanted = Responder(made.model).answer(asked)
    as_bytes = [
        {key: value if key == "text" else [Path(one).read_bytes() for one in value] for key, value in row.items()}
        for row in asked
    ]
    one = {"text": QUESTION, "image": as_bytes[0]["image"][0], "audio": None}
    names = ["answer", "score", "label_scores"]
    for table in (
        pd.DataFrame(asked),
        pd.DataFrame(as_bytes),
        json.loads(pd.DataFrame(asked).to_json(orient="records")),
    ):
        assert pd.DataFrame(model.predict(pd.DataFrame(table)))[names].to_dict("records") == wanted
    mixed = model.predict(pd.DataFrame([*as_bytes, one]))
    assert mixed[names].to_dict("records") == [*wanted, *Responder(made.model).answer([one])]
    pd.DataFrame(as_bytes).to_parquet(tmp_path / "asked.parquet")  # its lists come back as arrays
    assert model.predict(pd.read_parquet(tmp_path / "asked.parquet"))[names].to_dict("records") == wanted


def black(side: int) -> bytes:
    """A PNG of a few kilobytes that takes half a second to decode."""
    written = io.BytesIO()
    Image.new("L", (side, side)).save(written, "PNG")
    return written.getvalue()


def test_what_is_no_list_of_pictures_gets_a_sentence(made: Made) -> None:
    path = made.asked(rows()[0])["image"][0]
    for image, said in (
        ([path, ""], "the picture 2 of 2 is empty; wanted a picture or sound at every place of the list"),
        ([path, None, path], "the picture 2 of 3 is empty"),
        ([[path]], "the picture is a list; wanted bytes, or a path"),
        ([path, 7], "the picture 2 of 2 is a int; wanted bytes, or a path"),
        ([path, str(made.data / "gone.png")], "gone.png"),
        ([path] * 65, "65 pictures; wanted at most 64: a question has no room for more"),
        ([path] * 60, "tokens; wanted at most 64"),
        ([black(6000)] * 2, "2 pictures of 72,000,000 pixels together; wanted at most 64,000,000"),
        (np.zeros(3, np.uint8), "the picture is a ndarray"),
    ):
        assert said in Responder(made.model).answer([{"text": QUESTION, "image": image}])[0]["error"]
    nothing = Responder(made.model).answer([{"text": QUESTION, "image": []}, {"text": QUESTION}])
    assert nothing[0] == nothing[1] and "answer" in nothing[0]
