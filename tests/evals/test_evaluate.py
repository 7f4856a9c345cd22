"""The whole evaluation on a small world: rows, predictions, report."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from mmlm import artifacts
from mmlm.artifacts import Artifact
from mmlm.errors import DataError
from mmlm.evals.answer import Answer
from mmlm.evals.bench import Bench
from mmlm.evals.config import EvaluateConfig
from mmlm.evals.evaluate import RECIPE, evaluate_on, metric_name
from mmlm.features.sample import Sample
from mmlm.features.spec import ANSWER, BOS, EOS, FeatureSpec, TaskSpec
from mmlm.tracking import NullRun
from tests.evals.world import Characters, make_bench, make_samples

CONFIG = EvaluateConfig.model_validate({"bootstrap": {"samples": 200}, "baselines": {"logistic": {"max_records": 300}}})


def run_on(out: Path, config: EvaluateConfig = CONFIG, test: int = 160, change=None) -> Artifact:  # type: ignore[no-untyped-def]
    samples = make_samples(test, "test", groups=test // 2)
    if change:
        change(samples)
    bench = make_bench(samples, make_samples(300, "train", offset=1000), make_samples(80, "val", offset=5000))
    work = artifacts.begin(out, "report", recipe=RECIPE, config=config)
    return evaluate_on(bench, config, work, NullRun(out), story="small <story>")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return run_on(tmp_path_factory.mktemp("evals") / "report")


def rows_of(report: Artifact) -> list[dict]:  # type: ignore[type-arg]
    return json.loads((report.path / "scores.json").read_text())


def test_every_row_is_there_once(report: Artifact) -> None:
    rows = rows_of(report)
    keys = [tuple(r[k] for k in ("model", "task", "metric", "modalities", "lang", "split")) for r in rows]
    assert len(keys) == len(set(keys)) == report.counts["rows"]
    for model in ("teacher", "student", "majority", "logistic"):
        for given in ("text+image+audio", "text+image", "text+audio"):
            assert (model, "digit", "accuracy", given, "all", "test") in keys
    assert all(r["low"] <= r["value"] <= r["high"] and r["n"] > 0 for r in rows)
    assert {r["lang"] for r in rows} == {"all", "en", "zh"}
    assert {"bleu", "chrf", "exact_match", "roc_auc", "f1_macro", "f1_micro"} <= {r["metric"] for r in rows}
    names = [metric_name(r) for r in rows]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[\w\-. /:]+", name) for name in names)


def test_scores_are_those_of_the_predictions(report: Artifact) -> None:
    table = pq.read_table(report.path / "predictions.parquet").to_pandas()
    rows = {
        (r["model"], r["modalities"]): r for r in rows_of(report) if r["metric"] == "accuracy" and r["lang"] == "all"
    }
    for (model, given), part in table.groupby(["model", "given"]):
        assert rows[model, given]["value"] == pytest.approx((part.label == part.predicted).mean(), abs=1e-6)
        assert rows[model, given]["value"] == pytest.approx(part.correct.mean(), abs=1e-6)
    assert rows["teacher", "text+image+audio"]["value"] > rows["majority", "text+image+audio"]["value"] + 0.3
    assert rows["logistic", "text+image+audio"]["value"] > rows["majority", "text+image+audio"]["value"] + 0.1
    assert report.extra["headline"]["teacher"]["digit"] == rows["teacher", "text+image+audio"]


def test_the_same_again_is_the_same_noun(report: Artifact, tmp_path: Path) -> None:
    again = run_on(tmp_path / "again")
    assert again.digest == report.digest
    assert again.extra["test_digest"] == report.extra["test_digest"]
    other = run_on(tmp_path / "other", test=150)
    assert other.extra["test_digest"] != report.extra["test_digest"]


class Sources(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "data", "action")]
        assert tag not in ("script", "link", "iframe", "object")


def test_the_report_is_one_file(report: Artifact) -> None:
    html = (report.path / "report.html").read_text()
    sources = Sources()
    sources.feed(html)
    assert len(sources.found) > 8
    assert all(s.startswith("data:image/png;base64,") for s in sources.found)
    text = re.sub(r"data:[^\"]*", "", html)
    assert "http://" not in text
    assert "https://" not in text
    assert "url(" not in text
    assert not re.search(r"\bnan\b|\binf\b|None", text, re.IGNORECASE)
    assert "这是几" in text, "questions are shown in their own writing"
    assert "<story>" not in text, "names are escaped"
    assert "&lt;story&gt;" in text
    for name in ("modalities.png", "confusion.png", "roc.png", "reliability.png"):
        assert (report.path / name).read_bytes().startswith(b"\x89PNG")


def test_a_class_that_training_never_saw_is_wrong(tmp_path: Path) -> None:
    def rename(samples: list) -> None:  # type: ignore[type-arg]
        for s in samples[:40]:
            s.label = "never seen"

    report = run_on(tmp_path / "report", change=rename)
    table = pq.read_table(report.path / "predictions.parquet").to_pandas()
    assert not table[table.label == "never seen"].correct.any()
    best = max(r["value"] for r in rows_of(report) if r["metric"] == "accuracy" and r["lang"] == "all")
    assert best <= 120 / 160


def test_records_without_a_modality_are_left_out_of_its_row(tmp_path: Path) -> None:
    def silence(samples: list) -> None:  # type: ignore[type-arg]
        for s in samples[:60]:
            s.sounds = []

    report = run_on(tmp_path / "report", change=silence)
    n = {r["modalities"]: r["n"] for r in rows_of(report) if (r["metric"], r["lang"]) == ("accuracy", "all")}
    assert n == {"text+image+audio": 160, "text+image": 160, "text+audio": 100}


def test_fewer_records_are_always_the_same_ones(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"max_records": 30})
    report = run_on(tmp_path / "report", config)
    table = pq.read_table(report.path / "predictions.parquet").to_pandas()
    assert table.groupby(["model", "given"]).size().eq(30).all()
    again = pq.read_table(run_on(tmp_path / "again", config).path / "predictions.parquet").to_pandas()
    assert set(table.id) == set(again.id)
    assert {r["lang"] for r in rows_of(report)} == {"all"}, "15 records of a language are too few"


def test_an_empty_split_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no record"):
        run_on(tmp_path / "report", test=0, change=None)


class Parrot:
    """Gives the expected answer back, except to every third question."""

    def answer(self, samples, *, batch_size=64, given=None, generation=None):  # type: ignore[no-untyped-def]
        found = []
        for s in samples:
            right = int(s.id[1:]) % 3 > 0
            label = None if s.label is None else s.label if right else "好"
            scores = {} if label is None else {k: 0.9 if k == label else 0.1 for k in ("好", "bad")}
            found.append(Answer(s.answer if right else "", 0.5, label, scores))
        return found


def question(i: int, split: str, task: str) -> Sample:
    """A record without media: its question is all there is."""
    good, words = i % 2 == 0, Characters()
    text = words.encode(("很好吃" if good else "太难吃") + chr(0x4E00 + i % 50))
    tokens = np.array([BOS, *text, ANSWER, EOS], dtype=np.int32)
    name = f"name {i % 7}"
    label = ("好" if good else "bad") if task == "mood" else None
    return Sample(
        f"r{i}", task, tokens, len(text) + 1, split=split, group=f"g{i}", lang="zh", label=label, answer=label or name
    )


def test_tasks_of_words_alone_and_without_classes(tmp_path: Path) -> None:
    def split(name: str, first: int, n: int) -> list[Sample]:
        return [question(first + i, name, task) for i in range(n) for task in ("mood", "name")]

    splits = {"test": split("test", 0, 60), "train": split("train", 1000, 80), "val": split("val", 2000, 20)}
    tasks = [TaskSpec(name="mood", labels=["bad", "好"]), TaskSpec(name="name", has_text=True)]
    spec = FeatureSpec(vocab_size=70000, tokenizer_digest="0" * 64, max_len=64, tasks=tasks)
    bench = Bench(lambda s: splits[s], {"teacher": Parrot()}, spec, Characters())
    work = artifacts.begin(tmp_path / "report", "report", recipe=RECIPE, config=CONFIG)
    report = evaluate_on(bench, CONFIG, work, NullRun(work.path), story="words")
    rows = {(r["model"], r["task"], r["metric"]): r for r in rows_of(report) if r["lang"] == "all"}
    assert {r["modalities"] for r in rows.values()} == {"text"}
    assert rows["logistic", "mood", "accuracy"]["value"] > 0.95, "hashed characters tell the two apart"
    assert rows["teacher", "name", "exact_match"]["value"] == pytest.approx(2 / 3, abs=1e-6)
    assert ("teacher", "mood", "exact_match") not in rows, "a class is no answer in words"
    assert ("teacher", "name", "accuracy") not in rows
    assert ("logistic", "name", "exact_match") not in rows
    assert rows["majority", "name", "exact_match"]["value"] < 0.5
    html = (report.path / "report.html").read_text()
    assert "#1 好" in html, "a class that a plot cannot write is explained beside it"
    assert (report.path / "confusion-mood.png").exists()
    assert not (report.path / "confusion-name.png").exists()
