"""Rows that stand beside the models: the most frequent answer, and a logistic regression on the same features."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from mmlm.evals.bench import Bench, Samples
from mmlm.evals.config import EvaluateConfig, LogisticConfig
from mmlm.evals.flat import Decode, flat_rows
from mmlm.evals.linear import ManyLogistic, Ridge, held_of
from mmlm.evals.predictions import Prediction
from mmlm.features.sample import Sample
from mmlm.features.spec import FeatureSpec, TaskSpec


def evenly(found: Sequence[int], most: int) -> list[int]:
    """At most `most` of `found`, at equal steps: deterministic, and every part of the split is in it."""
    if len(found) <= most:
        return list(found)
    return [found[i] for i in np.linspace(0, len(found) - 1, most).round().astype(int)]


@dataclass
class Majority:
    """A task's most frequent class, and its most frequent answer per language, among the training records read."""

    label: str | None
    label_scores: dict[str, float]
    answers: dict[str, str]
    labels: list[str] | None = None
    """Those that more than half of the records have, where several may hold."""
    number: float | None = None
    """The mean of numbers."""

    def predict(self, samples: Sequence[Sample]) -> list[Prediction]:
        if self.number is not None:
            return [Prediction(None, {}, format(self.number, ".6g"), None, number=self.number) for _ in samples]
        if self.labels is not None:
            share = math.prod(max(p, 1 - p) for p in self.label_scores.values())
            return [Prediction(None, self.label_scores, None, share, self.labels) for _ in samples]
        share = self.label_scores.get(self.label or "", 0.0)
        return [
            Prediction(self.label, self.label_scores, self.answers.get(s.lang, self.answers.get("")), share)
            for s in samples
        ]


def fit_majority(labels: Sequence[str | None], answers: Sequence[tuple[str, str]]) -> Majority:
    """`answers`: (language, text) of each training record. Ties go to the first in order."""
    counts = Counter(label for label in labels if label is not None)
    total = sum(counts.values())
    by_lang: dict[str, Counter[str]] = {"": Counter(text for _, text in answers)}
    for lang, text in answers:
        by_lang.setdefault(lang, Counter())[text] += 1
    commonest = {lang: _first(counter) for lang, counter in by_lang.items()}
    return Majority(
        _first(counts),
        {k: counts[k] / total for k in sorted(counts)},
        {lang: text for lang, text in commonest.items() if text is not None},
    )


def fit_sets(task: TaskSpec, held: Sequence[list[str]]) -> Majority:
    counts = Counter(label for labels in held for label in set(labels))
    shares = {label: counts[label] / max(len(held), 1) for label in task.labels}
    return Majority(None, shares, {}, [label for label, p in shares.items() if p > 0.5])


def _first(counts: Counter[str]) -> str | None:
    return min(counts, key=lambda k: (-counts[k], k)) if counts else None


class Logistic:
    """A fitted logistic regression on flat rows of the modalities that one pass keeps."""

    def __init__(self, kept: frozenset[str], spec: FeatureSpec, decode: Decode) -> None:
        self.kept, self.spec, self.decode = kept, spec, decode
        self.model: Any = None

    def fit(self, train: Sequence[Sample], val: Sequence[Sample], config: LogisticConfig) -> Logistic:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        rows, labels = self._rows(train), [s.label or "" for s in train]
        val_rows, val_labels = (self._rows(val), [s.label or "" for s in val]) if val else (rows, labels)
        best = -1.0
        strengths = config.strengths if val else config.strengths[:1]
        for strength in strengths:
            model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=200, tol=1e-3))
            with warnings.catch_warnings(), threadpool_limits(1, user_api="blas"):
                warnings.simplefilter("ignore")  # a baseline that has not quite converged is still one
                model.fit(rows, labels)
            reached = float(model.score(val_rows, val_labels)) if len(strengths) > 1 else 0.0
            if reached > best:
                best, self.model = reached, model
        return self

    def predict(self, samples: Sequence[Sample]) -> list[Prediction]:
        classes = [str(c) for c in self.model.classes_]
        found = []
        for row in self.model.predict_proba(self._rows(samples)):
            top = int(row.argmax())
            scores = {k: float(v) for k, v in zip(classes, row, strict=True)}
            found.append(Prediction(classes[top], scores, None, float(row[top])))
        return found

    def _rows(self, samples: Sequence[Sample]) -> np.ndarray:
        return flat_rows(samples, self.kept, self.spec, self.decode)


class Baselines:
    """Majority and logistic rows, fitted when first asked for."""

    def __init__(self, bench: Bench, config: EvaluateConfig) -> None:
        self.bench, self.config = bench, config.baselines
        switches = {"majority": self.config.majority, "logistic": self.config.logistic.enabled}
        numbers = any(task.number for task in bench.spec.tasks)
        switches["ridge"] = numbers and self.config.logistic.enabled
        self.names = [name for name, on in switches.items() if on]
        self._train: dict[str, list[Sample]] = {}
        self._val: dict[str, list[Sample]] = {}
        self._majority: dict[str, Majority] = {}
        self._fitted: dict[tuple[str, frozenset[str]], Logistic | ManyLogistic | Ridge | None] = {}
        self._read = False

    def fitted(self, name: str, task: str, kept: frozenset[str]) -> Majority | Logistic | ManyLogistic | Ridge | None:
        """None where the baseline cannot answer: no classes or numbers, or only one class in the training split."""
        if not self._read:
            self._read_training()
        if name == "majority":
            return self._majority.get(task)
        if (name == "ridge") != bool(self.bench.spec.task(task).number):
            return None
        if (task, kept) not in self._fitted:
            self._fitted[task, kept] = self._fit(task, kept)
        return self._fitted[task, kept]

    def _fit(self, task: str, kept: frozenset[str]) -> Logistic | ManyLogistic | Ridge | None:
        def usable(samples: list[Sample]) -> list[Sample]:
            return [s for s in samples if not kept or not kept.isdisjoint(s.modalities)]

        train, val = usable(self._train.get(task, [])), usable(self._val.get(task, []))
        told, decode = self.bench.spec.task(task), self.bench.tokenizer.decode
        if told.number:
            return Ridge(kept, self.bench.spec, decode).fit(train) if len(train) > 1 else None
        if told.multiple:
            many = ManyLogistic(told, kept, self.bench.spec, decode)
            return many.fit(train, val, self.config.logistic) if train else None
        if len({s.label for s in train}) < 2:
            return None
        model = Logistic(kept, self.bench.spec, self.bench.tokenizer.decode)
        return model.fit(train, val, self.config.logistic)

    def _most_frequent(
        self, task: str, labels: list[str | None], answers: list[tuple[str, str]], train: list[Sample]
    ) -> Majority:
        told = next((t for t in self.bench.spec.tasks if t.name == task), TaskSpec(name=task))
        if told.number:
            return Majority(None, {}, {}, number=told.number[0])
        if told.multiple:
            return fit_sets(told, [held_of(s) or [] for s in train])
        return fit_majority(labels, answers)

    def _read_training(self) -> None:
        self._read = True
        labels: dict[str, list[str | None]] = {}
        answers: dict[str, list[tuple[str, str]]] = {}
        headed: dict[str, list[Sample]] = {}
        reader = self.bench.read("train")
        numbers: dict[str, list[int]] = {}
        for i, task in enumerate(_tasks(reader)):
            numbers.setdefault(task, []).append(i)
        for task, found in numbers.items():
            most = self.config.logistic.max_records
            for sample in (reader[i] for i in evenly(found, most)):
                labels.setdefault(task, []).append(sample.label)
                answers.setdefault(task, []).append((sample.lang, sample.answer or ""))
                if _has_target(sample):
                    headed.setdefault(task, []).append(sample)
        self._majority = {
            task: self._most_frequent(task, labels[task], answers[task], headed.get(task, [])) for task in labels
        }
        self._train = headed if self.config.logistic.enabled else {}
        if self.config.logistic.enabled and len(self.config.logistic.strengths) > 1:
            reader = self.bench.read("val")
            for sample in (reader[i] for i in range(len(reader))):
                if _has_target(sample):
                    self._val.setdefault(sample.task, []).append(sample)


def _has_target(sample: Sample) -> bool:
    """Whether a record has a class, classes or a number to be answered."""
    return sample.label is not None or sample.labels is not None or sample.number is not None


def _tasks(reader: Samples) -> list[str]:
    names = getattr(reader, "tasks", None)
    return names() if names else [reader[i].task for i in range(len(reader))]
