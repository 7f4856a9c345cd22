"""Records of named numbers and categories, from a table to answers: a set of classes and a number are asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmlm.artifacts import Artifact
from mmlm.config import parse
from mmlm.corpus.config import ScanConfig
from mmlm.corpus.scan import scan
from mmlm.evals.config import EvaluateConfig
from mmlm.evals.evaluate import evaluate
from mmlm.launch.local import ranks
from mmlm.publish.answering import Responder
from mmlm.shards.config import ShardConfig
from mmlm.shards.shard import shard
from mmlm.tracking import NullTracker
from mmlm.train.config import TrainConfig
from mmlm.train.train import train

SCAN = {
    "sources": [
        {
            "kind": "table", "files": "patients.jsonl",
            "map": {"id": "id", "split": "split", "fields": {"age": "age", "ward": "ward"}},
            "ask": [
                {"task": "signs", "question": "Which signs?", "labels": "signs"},
                {"task": "dose", "question": "Which dose?", "number": "dose"},
            ],
        }
    ]
}  # fmt: skip
TRAIN = {
    "steps": 120, "log_every": 20, "save_every": 120, "model": {"width": 32, "layers": 1, "heads": 2}, "precision": "fp32",
    "data": {"batch": 64}, "optimizer": {"lr": 1e-2}, "loss": {"answer": 0.1},
}  # fmt: skip


def patients(n: int = 400) -> list[dict[str, Any]]:
    """The signs follow from ward and age, the dose from age and ward."""
    rng, rows = np.random.default_rng(0), []
    for i in range(n):
        age, ward = float(rng.uniform(20, 80)), ["north", "south"][int(rng.integers(2))]
        signs = (["fever"] if age > 50 else []) + (["rash"] if ward == "north" else [])
        dose = 0.5 * age + (20 if ward == "south" else 0) + float(rng.normal(0, 1))
        split = "test" if i % 5 == 0 else "val" if i % 5 == 1 else "train"
        rows.append({"id": f"p{i:03d}", "age": age, "ward": ward, "signs": signs, "dose": dose, "split": split})
    return rows


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    out = tmp_path_factory.mktemp("records")
    (out / "patients.jsonl").write_text("".join(json.dumps(row) + "\n" for row in patients()))
    manifest = scan(parse(ScanConfig, SCAN, "test"), data=out, out=out / "manifest", tracker=None)
    features = {"tokenizer": {"vocab_size": 300}, "max_len": 32}
    config = parse(ShardConfig, {"features": features, "ray_from": 10**9}, "test")
    shards = shard(config, manifest, data=out, out=out / "shards", workers=1, tracker=None)
    model = train(parse(TrainConfig, TRAIN, "test"), shards, out=out / "model", launch=ranks(1), tracker=NullTracker())
    return {"manifest": manifest, "shards": shards, "model": model}


def test_the_manifest_knows_what_is_asked(made: dict[str, Artifact]):
    dose, signs = made["manifest"].extra["tasks"]
    assert signs["labels"] == ["fever", "rash"] and signs["multiple"] and not signs["has_text"]
    doses = [row["dose"] for row in patients() if row["split"] == "train"]
    assert dose["number"] == pytest.approx([np.mean(doses), np.std(doses)]) and dose["labels"] == []


def test_sets_and_numbers_are_learnt_and_scored_beside_linear_models(made: dict[str, Artifact], tmp_path: Path):
    config = parse(EvaluateConfig, {"bootstrap": {"samples": 200}}, "test")
    report = evaluate(
        config, made["shards"], {"teacher": made["model"]}, out=tmp_path / "report", tracker=None, story="s"
    )
    rows = {(r["model"], r["task"], r["metric"]): r for r in json.loads((report.path / "scores.json").read_text())}
    assert rows["teacher", "signs", "f1_micro"]["value"] > 0.9 > rows["majority", "signs", "f1_micro"]["value"]
    assert rows["teacher", "signs", "roc_auc/rash"]["value"] > 0.95
    assert rows["teacher", "dose", "r2"]["value"] > 0.9 > 0.1 > rows["majority", "dose", "r2"]["value"]
    assert rows["ridge", "dose", "mae"]["value"] < 1.5 and rows["logistic", "signs", "f1_micro"]["value"] > 0.9
    found = rows["teacher", "dose", "rmse"]
    assert found["low"] < found["value"] < found["high"] and found["n"] == 80
    assert ("teacher", "dose", "exact_match") not in rows and ("teacher", "signs", "exact_match") not in rows


def test_fields_are_asked_by_name(made: dict[str, Artifact]):
    responder = Responder(made["model"].path)
    young, old, text, misspelt, wrong = responder.answer(
        [
            {"text": "Which signs?", "fields": {"age": 25, "ward": "north"}},
            {"text": "Which dose?", "fields": {"age": 75, "ward": "south"}},
            {"text": "Which dose?", "fields": '{"age": 75, "ward": "south"}'},
            {"text": "Which dose?", "fields": {"aeg": 75}},
            {"text": "Which dose?", "fields": {"age": "old"}},
        ]
    )
    assert young["labels"] == ["rash"] and young["answer"] == "rash" and set(young["label_scores"]) == {"fever", "rash"}
    assert old["number"] == pytest.approx(57.5, abs=4) and old["score"] is None
    assert text["answer"] == old["answer"] and text["number"] == pytest.approx(old["number"], rel=1e-5)
    assert "unknown field aeg" in misspelt["error"] and "age" in misspelt["error"]
    assert "wanted" in wrong["error"] or "number" in wrong["error"]
