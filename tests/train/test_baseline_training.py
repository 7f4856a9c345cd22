"""The small models under the same training as the Transformer: every ZeRO stage, a stop in between, the same commands."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mmlm import artifacts
from mmlm.artifacts import Artifact
from mmlm.config import parse
from mmlm.data.reader import ShardReader
from mmlm.errors import ConfigError
from mmlm.evals.answer import Answerer
from mmlm.features import spec as feature_spec
from mmlm.launch.local import ranks
from mmlm.tracking import NullTracker
from mmlm.train.config import TrainConfig
from mmlm.train.train import train

RECURRENT = {"width": 32, "layers": 1}
MODELS: dict[str, dict[str, Any]] = {
    "cnn": {"kind": "cnn", "channels": [8, 16], "width": 32},
    "lstm": {"kind": "lstm", **RECURRENT},
    "gru": {"kind": "gru", **RECURRENT},
}


def run(shards: Artifact, out: Path, count: int, kind: str, **changes: Any) -> Artifact:
    given = {"steps": 4, "save_every": 2, "keep": 3, "log_every": 1, "data": {"batch": 16}, "model": MODELS[kind]}
    config = parse(TrainConfig, {**given, **changes}, "test")
    return train(config, shards, out=out, launch=ranks(count), tracker=NullTracker())


def losses(out: Path) -> list[float]:
    return [json.loads(line)["metrics"]["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def shards(keypad_shards: Artifact, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """kind → shards that it can learn from: for a CNN, the same digits asked for as classes only."""
    folder = tmp_path_factory.mktemp("classes") / "shards"
    shutil.copytree(keypad_shards.path, folder)
    spec = feature_spec.load(folder)
    tasks = [task.model_copy(update={"has_text": False}) for task in spec.tasks]
    feature_spec.save(spec.model_copy(update={"tasks": tasks}), folder)
    return {"cnn": artifacts.read(folder), "lstm": keypad_shards, "gru": keypad_shards}


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("kind", "stage"), [("cnn", 3), pytest.param("lstm", 2, marks=SLOW), pytest.param("gru", 3, marks=SLOW)]
)
def test_two_steps_and_two_more_after_a_stop_equal_four(
    kind: str, stage: int, shards: dict[str, Artifact], tmp_path: Path
):
    whole = run(shards[kind], tmp_path / "whole", 1, kind, zero={"stage": stage})
    out = tmp_path / "model"
    shutil.copytree(whole.path, out)
    (out / "artifact.json").unlink()
    shutil.rmtree(out / "checkpoints" / "step-00000004")
    (out / artifacts.WORK).write_text(json.dumps({"fingerprint": whole.fingerprint}))
    resumed = run(shards[kind], out, 1, kind, zero={"stage": stage})
    assert losses(out) == losses(whole.path) and resumed.digest == whole.digest
    assert whole.counts["predicted"]["parameters"] == whole.counts["parameters"]
    answerer = Answerer(out)
    assert answerer.model.config.kind == kind  # type: ignore[comparison-overlap]
    reader = ShardReader(shards[kind].path, ("test",), 10**7)
    samples = [reader[n] for n in range(4)]
    assert all(a.label in answerer.spec.tasks[0].labels for a in answerer.answer(samples))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cnn", "lstm"])
def test_a_small_model_is_evaluated_asked_and_explained_as_any(
    kind: str, shards: dict[str, Artifact], keypad_manifest: Artifact, tmp_path: Path
):
    from mmlm.evals.config import EvaluateConfig
    from mmlm.evals.evaluate import evaluate
    from mmlm.evals.explain import explain
    from mmlm.publish.answering import Responder

    model = run(shards[kind], tmp_path / "model", 1, kind)
    config = parse(EvaluateConfig, {"bootstrap": {"samples": 100}, "examples": 2}, "test")
    report = evaluate(config, shards[kind], {"teacher": model}, out=tmp_path / "report", tracker=None, story="t")
    rows = json.loads((report.path / "scores.json").read_text())
    assert {row["modalities"] for row in rows if row["model"] == "teacher"} >= {"text+image", "text+audio"}
    picture = next((keypad_manifest.path.parent / "raw").rglob("*.png"))
    responder = Responder(model.path)
    question = {"text": "Which digit is it?", "image": str(picture)}
    answer = responder.answer([question])[0]
    assert set(answer["label_scores"]) == {str(i) for i in range(10)}
    found = explain(responder.answerer, responder.sample(question), label="3")
    assert found.complete and found.rolled_out is False and found.by_modality["image"] != 0
    assert (found.by_modality.get("text", 0.0) == 0) is (kind == "cnn")  # a cnn reads no text


def test_texts_are_refused_before_any_rank_starts(tmp_path: Path, keypad_shards: Artifact):
    with pytest.raises(ConfigError, match="task `digit`, whose answers are texts"):
        run(keypad_shards, tmp_path / "model", 1, "cnn")
    assert not (tmp_path / "model" / "logs").exists()


@pytest.mark.parametrize("kind", ["lstm", pytest.param("gru", marks=SLOW)])
def test_every_stage_equals_plain_pytorch(kind: str, tmp_path: Path):
    from tests.train.test_parity import compare, zero

    compare(2, tmp_path, [{"config": zero(s, 2, model={**MODELS[kind], "layers": 2})} for s in (0, 1, 2, 3)], steps=7)


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(MODELS))
def test_two_ranks_at_every_stage_equal_one(kind: str, shards: dict[str, Artifact], tmp_path: Path):
    alone = losses(run(shards[kind], tmp_path / "one", 1, kind, precision="fp32").path)
    for stage in (0, 1, 2, 3):
        both = run(shards[kind], tmp_path / f"two-{stage}", 2, kind, precision="fp32", zero={"stage": stage})
        assert losses(both.path) == pytest.approx(alone, rel=2e-5)
