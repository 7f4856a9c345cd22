"""Figures of a corpus, gathered in one pass over its kept records: counts, tasks, fields, sizes of media."""

from __future__ import annotations

import hashlib
import math
import statistics
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from mmlm.corpus.records import Record, from_row
from mmlm.corpus.sniff import Header

MOST_QUESTIONS = 20_000
"""Distinct questions counted per task; those that come later in order of id are not, beyond this."""
QUESTION_CHARACTERS = 32 << 20
"""Characters of the distinct questions of a task, likewise: whole documents are asked about, too."""
LISTED_QUESTIONS = 200
MOST_VALUES = 1_000
"""Distinct values of one category that are kept."""
MOST_SIZES = 50_000
"""Media files whose sizes enter the medians."""
MOST_LABELS = 1_000
"""Distinct labels up to which records with several at once are a matter of a head; with more they are free words, and
answered as text."""


class Tally:
    """`add` every kept record in order of id (with its final split); then read `counts`, `tasks`, `fields`.

    Keeps eight bytes a record, for the copies.
    """

    def __init__(self) -> None:
        self.splits: Counter[str] = Counter()
        self.by_task: Counter[str] = Counter()
        self.langs: Counter[str] = Counter()
        self.modalities: Counter[str] = Counter()
        self.labels: dict[str, set[str]] = defaultdict(set)
        self.other_labels: dict[str, set[str]] = defaultdict(set)
        self.has_text: dict[str, bool] = defaultdict(bool)
        self.multiple: dict[str, bool] = defaultdict(bool)
        self.targets: dict[str, Moments] = {}
        self.task_langs: dict[str, set[str]] = defaultdict(set)
        self.questions: dict[str, Counter[str]] = defaultdict(Counter)
        self.asked: Counter[str] = Counter()
        """task → characters of its questions"""
        self.numbers: dict[str, Moments] = {}
        self.values: dict[str, Counter[str]] = defaultdict(Counter)
        self.trained, self.held = array("Q"), array("Q")
        """Of each record that is for training, and of each other one, a hash of task and content."""

    def of(self, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """`rows` of a manifest as they are, each counted on its way."""
        for row in rows:
            self.add(from_row(row))
            yield row

    def add(self, record: Record) -> None:
        self.splits[record.split] += 1
        same = hashlib.blake2b(f"{record.task}\0{record.content_hash}".encode("utf-8", "surrogatepass"), digest_size=8)
        (self.trained if record.split == "train" else self.held).append(int.from_bytes(same.digest(), "big"))
        self.by_task[record.task] += 1
        self.langs[record.lang] += 1
        self.modalities.update(record.modalities())
        if record.lang:
            self.task_langs[record.task].add(record.lang)
        target = record.target
        labels = {target.label} if target.label is not None else set(target.labels or ())
        self.has_text[record.task] |= target.text is not None
        self.multiple[record.task] |= target.label is None and target.labels is not None
        if record.split != "train":
            self.other_labels[record.task] |= labels
            return
        self.labels[record.task] |= labels
        if target.number is not None and math.isfinite(target.number):
            self.targets.setdefault(record.task, Moments()).add(target.number)
        question = "\n".join(p.text or "" for p in record.parts if p.kind == "text" and p.role == "user" and not p.turn)
        self._asked(record.task, question)
        for part in record.parts:
            for name, value in (part.fields or {}).items():
                self._field(name, value)

    def _asked(self, task: str, question: str) -> None:
        known = self.questions[task]
        if not question:
            return
        if question not in known:
            if len(known) >= MOST_QUESTIONS or self.asked[task] + len(question) > QUESTION_CHARACTERS:
                return
            self.asked[task] += len(question)
        known[question] += 1

    def _field(self, name: str, value: float | str | None) -> None:
        if isinstance(value, str):
            seen = self.values[name]
            if value in seen or len(seen) < MOST_VALUES:
                seen[value] += 1
        elif value is not None:
            self.numbers.setdefault(name, Moments()).add(value)

    def counts(self) -> dict[str, Any]:
        return {
            **{split: self.splits[split] for split in ("train", "val", "test")},
            "tasks": dict(sorted(self.by_task.items())),
            "langs": dict(sorted(self.langs.items())),
            "modalities": dict(sorted(self.modalities.items())),
        }

    def tasks(self) -> list[dict[str, Any]]:
        """Per task, sorted by name: name, labels (of the training split), has_text, langs, questions; `multiple` where
        several labels hold at once, and the mean and standard deviation of a `number` where there is one."""
        return [
            {
                "name": task,
                **self._answered(task),
                "langs": sorted(self.task_langs[task]),
                "questions": [q for q, _ in sorted(self.questions[task].items(), key=lambda x: (-x[1], x[0]))][
                    :LISTED_QUESTIONS
                ],
            }
            for task in sorted(self.by_task)
        ]

    def _answered(self, task: str) -> dict[str, Any]:
        """What answers a task: one of its labels, several, a number, or a text."""
        labels, several = sorted(self.labels[task]), self.multiple[task]
        if several and len(labels) > MOST_LABELS:
            return {"labels": [], "has_text": True}
        found: dict[str, Any] = {"labels": labels, "has_text": self.has_text[task]}
        if several and labels:
            found["multiple"] = True
        if task in self.targets and not labels and not self.has_text[task]:
            found["number"] = [self.targets[task].mean, self.targets[task].deviation]
        return found

    def copies(self) -> int:
        """Training records that are a val or test record once more: the same task, parts and target."""
        return int(np.isin(np.array(self.trained, np.uint64), np.array(self.held, np.uint64)).sum())

    def unseen_labels(self) -> dict[str, list[str]]:
        """Classes that only validation or test records have: no model can have learnt them."""
        found = {t: sorted(self.other_labels[t] - self.labels[t]) for t in sorted(self.by_task)}
        return {task: labels for task, labels in found.items() if labels}

    def fields(self) -> dict[str, Any]:
        """`numbers`: name → [mean, standard deviation] (1 where it is 0); `categories`: name → sorted values.

        A name with both is what most of its values are; the others count as missing.
        """
        categories = {n: c for n, c in self.values.items() if n not in self.numbers or c.total() >= self.numbers[n].n}
        numbers = {
            name: [found.mean, found.deviation]
            for name, found in sorted(self.numbers.items())
            if name not in categories
        }
        return {"numbers": numbers, "categories": {n: sorted(c) for n, c in sorted(categories.items())}}


class Moments:
    """Running mean and standard deviation (Welford 1962)."""

    def __init__(self) -> None:
        self.n, self.mean, self._squares = 0, 0.0, 0.0

    def add(self, value: float) -> None:
        self.n += 1
        delta = value - self.mean
        self.mean += delta / self.n
        self._squares += delta * (value - self.mean)

    @property
    def deviation(self) -> float:
        """1 where all values are the same."""
        return math.sqrt(self._squares / self.n) or 1.0


class Sizes:
    """Sizes of the media, from their headers."""

    def __init__(self) -> None:
        self.sides: list[int] = []
        self.seconds: list[float] = []
        self.formats: Counter[str] = Counter()
        self.rates: Counter[int] = Counter()
        self.colour = 0

    def add(self, header: Header) -> None:
        self.formats[header.format] += 1
        if header.kind == "image":
            self.colour += header.channels != 1
            if header.width and len(self.sides) < MOST_SIZES:
                self.sides.append(max(header.width, header.height))
        elif header.kind == "audio":
            self.rates[header.rate] += 1
            if len(self.seconds) < MOST_SIZES:
                self.seconds.append(header.seconds)

    def summary(self) -> dict[str, Any]:
        """Uses of media by format; longest side in pixels and length in seconds: median and 95 % quantile."""
        found: dict[str, Any] = {"formats": dict(sorted(self.formats.items()))}
        if self.sides:
            found["image_side"] = {"median": statistics.median(self.sides), "p95": quantile(self.sides, 0.95)}
            # up to which power of two, since single sizes would make a long list
            powers = Counter(1 << max(0, side - 1).bit_length() for side in self.sides)
            found["image_sides"] = {str(power): n for power, n in sorted(powers.items())}
            found["coloured"] = self.colour
        if self.seconds:
            found["audio_seconds"] = {
                "median": round(statistics.median(self.seconds), 3),
                "p95": round(quantile(self.seconds, 0.95), 3),
                "max": round(max(self.seconds), 3),
            }
            found["audio_rates"] = {str(rate): n for rate, n in sorted(self.rates.items())}
        return found


def quantile(values: list[Any], share: float) -> Any:
    """The value below which `share` of `values` lie (nearest rank)."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(share * len(ranked)))]
