"""What models answered, and the table of score rows made from it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmlm.evals import scores, texts
from mmlm.evals.config import EvaluateConfig
from mmlm.evals.number_scores import number_scores
from mmlm.evals.set_scores import set_scores
from mmlm.evals.statistics import Resamples, Score, interval
from mmlm.features.sample import Sample
from mmlm.features.spec import TaskSpec
from mmlm.storage import atomic_write


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known about a record without its features. `at` is its number in the reader of its split."""

    at: int
    id: str
    task: str
    split: str
    group: str
    lang: str
    label: str | None
    expected: str | None
    modalities: tuple[str, ...]
    labels: tuple[str, ...] | None = None
    """Those that hold, where several may."""
    number: float | None = None


def facts_of(at: int, sample: Sample, split: str) -> Facts:
    labels = None if sample.labels is None else tuple(sample.labels)
    return Facts(
        at, sample.id, sample.task, split, sample.group, sample.lang, sample.label, sample.answer, sample.modalities,
        labels, sample.number,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Prediction:
    """One answer. `answer` is None for a baseline that has no words, `label` None for a task without classes, `labels`
    for one of whose classes just one holds, `number` for one that asks for none; a number has no `score`."""

    label: str | None
    label_scores: dict[str, float]
    answer: str | None
    score: float | None
    labels: list[str] | None = None
    number: float | None = None


@dataclass
class Answered:
    """The answers of one model to the records of one task and split, under one set of given modalities."""

    model: str
    task: TaskSpec
    modalities: str
    split: str
    facts: list[Facts]
    predictions: list[Prediction]

    def select(self, at: Sequence[int]) -> Answered:
        return Answered(
            self.model, self.task, self.modalities, self.split,
            [self.facts[i] for i in at], [self.predictions[i] for i in at],
        )  # fmt: skip

    def correct(self) -> np.ndarray:
        """(N,) bool: the right class or classes where the record has some, else the right words."""
        return np.array([is_correct(f, p) for f, p in zip(self.facts, self.predictions, strict=True)], dtype=bool)


def is_correct(facts: Facts, prediction: Prediction) -> bool:
    if facts.label is not None and prediction.label is not None:
        return facts.label == prediction.label
    if prediction.labels is not None and (held := held_labels(facts)) is not None:
        return held == set(prediction.labels)
    if facts.number is not None and prediction.number is not None:
        return format(facts.number, ".6g") == format(prediction.number, ".6g")
    if facts.expected is None or prediction.answer is None:
        return False
    return texts.normalise(prediction.answer) == texts.normalise(facts.expected)


def held_labels(facts: Facts) -> set[str] | None:
    """The classes that hold, where several may."""
    if facts.labels is not None:
        return set(facts.labels)
    return None if facts.label is None else {facts.label}


@dataclass
class ClassView:
    """Records with a class, as numbers: classes are the task's, then those that only this split has."""

    classes: list[str]
    truth: np.ndarray
    """(N,) number of the true class."""
    given: np.ndarray
    """(N,) number of the given class; -1 for one outside `classes`."""
    scores: np.ndarray
    """(N, classes of the task); empty when the model gives no scores."""


def class_view(answered: Answered) -> ClassView | None:
    """None when the task has no classes, or this model answers without them."""
    pairs = [
        (f.label, p)
        for f, p in zip(answered.facts, answered.predictions, strict=True)
        if f.label is not None and p.label is not None
    ]
    known = answered.task.labels
    if not known or not pairs:
        return None
    unseen = sorted({label for label, _ in pairs} - set(known))
    number = {label: i for i, label in enumerate([*known, *unseen])}
    scored = all(p.label_scores for _, p in pairs)
    table = np.array([[p.label_scores.get(k, 0.0) for k in known] for _, p in pairs]) if scored else np.zeros((0, 0))
    return ClassView(
        [*known, *unseen],
        np.array([number[label] for label, _ in pairs]),
        np.array([number.get(p.label or "", -1) for _, p in pairs]),
        table,
    )


def score_rows(answered: Answered, config: EvaluateConfig) -> list[dict[str, Any]]:
    """Rows {model, task, metric, modalities, lang, split, n, value, low, high}: all languages, then each large one."""
    rows = _rows_of(answered, config, "all")
    by_lang: dict[str, list[int]] = {}
    for i, facts in enumerate(answered.facts):
        by_lang.setdefault(facts.lang, []).append(i)
    for lang, at in sorted(by_lang.items()):
        if lang and lang != "all" and len(at) >= config.min_n_per_language:
            rows += _rows_of(answered.select(at), config, lang)
    return rows


@functools.lru_cache(maxsize=4)
def _resamples(groups: tuple[str, ...], samples: int, seed: int) -> Resamples:
    """All models are resampled alike, so that their intervals differ by their answers only."""
    return Resamples(len(groups), groups, samples, seed)


def _rows_of(answered: Answered, config: EvaluateConfig, lang: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []

    def add(groups: list[str], found: dict[str, Score]) -> None:
        resamples = _resamples(tuple(groups), config.bootstrap.samples, config.bootstrap.seed)
        for metric, score in found.items():
            got = interval(score, resamples, config.bootstrap.confidence, share=metric in scores.SHARES)
            if not np.isfinite(got.value):
                continue
            rows.append(
                {
                    "model": answered.model, "task": answered.task.name, "metric": metric,
                    "modalities": answered.modalities, "lang": lang, "split": answered.split, "n": len(groups),
                    "value": round(got.value, 6), "low": round(got.low, 6), "high": round(got.high, 6),
                }
            )  # fmt: skip

    pairs = list(zip(answered.facts, answered.predictions, strict=True))
    view = class_view(answered)
    if view is not None:
        add([f.group for f, p in pairs if f.label is not None and p.label is not None], _class_scores(view))
    sets = [(f, p) for f, p in pairs if p.labels is not None and held_labels(f) is not None]
    if sets:
        add([f.group for f, _ in sets], _set_scores(answered.task, sets))
    numbers = [(f, p) for f, p in pairs if f.number is not None and p.number is not None]
    if numbers:
        truth, said = (np.array(x, np.float64) for x in zip(*((f.number, p.number) for f, p in numbers), strict=True))
        add([f.group for f, _ in numbers], number_scores(truth, said))
    words = [(f, p.answer) for f, p in pairs if f.expected is not None and p.answer is not None]
    if words and (answered.task.has_text or not (answered.task.labels or answered.task.number)):
        add([f.group for f, _ in words], _text_scores(words))
    return rows


def _class_scores(view: ClassView) -> dict[str, Score]:
    found = scores.class_scores(view.truth, view.given, len(view.classes))
    if len(view.scores):
        found["roc_auc"] = scores.roc_auc(view.truth, view.scores)
        found["calibration_error"] = scores.calibration_error(view.scores.max(1), view.truth == view.given)
    return found


def _set_scores(task: TaskSpec, pairs: list[tuple[Facts, Prediction]]) -> dict[str, Score]:
    held = [held_labels(f) or set() for f, _ in pairs]
    known = [*task.labels, *sorted(set().union(*held) - set(task.labels))]  # one that training never saw is a miss
    truth = np.array([[label in one for label in known] for one in held])
    given = np.array([[label in (p.labels or ()) for label in known] for _, p in pairs])
    scored = all(p.label_scores for _, p in pairs)
    table = np.array([[p.label_scores.get(k, 0.0) for k in known] for _, p in pairs]) if scored else np.zeros((0, 0))
    return set_scores(truth, given, table, known)


def _text_scores(words: list[tuple[Facts, str]]) -> dict[str, Score]:
    answers, langs = [answer for _, answer in words], [facts.lang for facts, _ in words]
    expected = [facts.expected or "" for facts, _ in words]
    return {
        "exact_match": scores.share(texts.exact_match(answers, expected)),
        "chrf": texts.pooled("chrf", answers, expected, langs),
        "bleu": texts.pooled("bleu", answers, expected, langs),
    }


def headline_metric(task: TaskSpec) -> str:
    """The one figure of a task: accuracy where it has classes, F1 over all classes where several may hold, the share of
    the variance that is explained where it asks for a number, else exact match."""
    if task.number:
        return "r2"
    return "f1_micro" if task.multiple else "accuracy" if task.labels else "exact_match"


PREDICTIONS = pa.schema(
    [
        ("model", pa.string()),
        ("given", pa.string()),
        ("split", pa.string()),
        ("id", pa.string()),
        ("group", pa.string()),
        ("task", pa.string()),
        ("lang", pa.string()),
        ("label", pa.string()),
        ("predicted", pa.string()),
        ("score", pa.float64()),
        ("correct", pa.bool_()),
        ("answer", pa.string()),
        ("expected", pa.string()),
        ("labels", pa.list_(pa.string())),
        ("predicted_labels", pa.list_(pa.string())),
        ("number", pa.float64()),
        ("predicted_number", pa.float64()),
    ]
)


def write_predictions(path: Path, answered: Sequence[Answered]) -> None:
    """All answers, model by model, in the order of the split."""
    rows = [
        {
            "model": a.model, "given": a.modalities, "split": a.split, "id": f.id, "group": f.group, "task": f.task,
            "lang": f.lang, "label": f.label, "predicted": p.label, "score": p.score,
            "correct": is_correct(f, p), "answer": p.answer, "expected": f.expected,
            "labels": None if (held := held_labels(f)) is None or p.labels is None else sorted(held),
            "predicted_labels": p.labels, "number": f.number, "predicted_number": p.number,
        }
        for a in answered
        for f, p in zip(a.facts, a.predictions, strict=True)
    ]  # fmt: skip
    with atomic_write(path) as f:
        pq.write_table(pa.Table.from_pylist(rows, PREDICTIONS), f)
