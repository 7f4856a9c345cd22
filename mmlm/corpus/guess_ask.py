"""What is asked of the rows of a table."""

from __future__ import annotations

from typing import Any

from mmlm.corpus.column_names import ANSWER, LABEL, QUESTION, last_of, name_of
from mmlm.corpus.columns import MOST_CLASSES, WELL_FILLED, Columns
from mmlm.corpus.drafts import as_label
from mmlm.corpus.guess import _listed
from mmlm.corpus.readers.hf import TRANSCRIBE
from mmlm.errors import DataError

_CLASS_WORDS = {"label", "class", "target", "category", "y", "标签", "类别", "分类"}
"""Names of a label that say nothing about what is asked."""
_WHAT = {"en": "What is this?", "zh": "这是什么？"}


class Asked(Columns):
    """Columns, and the one question that is asked of their rows."""

    def ask(self, roles: dict[str, str], likely: str) -> tuple[dict[str, Any], dict[str, list[str]], list[str]]:
        """The one question to ask: (`ask` entry, task → classes, words)."""
        asked = next(iter(self.named(QUESTION)), None)
        answer = next((c for c in self.named(ANSWER) if c != asked and not self.is_number(c)), None)
        if asked and answer:
            self.take(asked), self.take(answer)
            entry: dict[str, Any] = {"task": "answer", "text": asked, "answer": answer}
            return entry, {"answer": []}, [f"`{asked}` is the question and `{answer}` its answer, to be written."]
        media = "image" in roles or "audio" in roles
        if label := self.label(likely):
            return self.ask_label(label, media)
        if written := self.too_many_classes():
            self.take(written)
            return self.ask_written(written, media)
        if answer:
            self.take(answer)
            text = None if media else self.text()
            if text:
                entry = {"task": "answer", "text": text, "answer": answer}
                return entry, {"answer": []}, [f"`{text}` is what to read and `{answer}` what to write."]
        written = answer if answer else self.text() if media else None
        if written and media:
            heard = "image" not in roles
            task, wording = ("transcript", TRANSCRIBE) if heard else ("describe", _WHAT)
            entry = {"task": task, "question": wording, "answer": written}
            return (
                entry,
                {task: []},
                [f"`{written}` is the text to be written about each.", *self.sparse_words(written)],
            )
        raise DataError(
            f"no column to be answered among {_listed(self.values, 20)}",
            wanted="a column of classes (such as `label`), or the columns `question` and `answer`",
            cure="name the column `label`, or write scan.yaml by hand after jobs/configs/stamps/scan.yaml",
        )

    def ask_label(self, label: str, media: bool) -> tuple[dict[str, Any], dict[str, list[str]], list[str]]:
        """The `ask` entry for a column of classes."""
        task = self.task_name(label)
        classes = sorted({as_label(t) or "" for t in self.distinct(label)} - {""})
        words = [f"`{label}` is what to answer, {len(classes)} classes: {_listed(classes)}.", *self.sparse_words(label)]
        if media:
            self.leaking = [
                c for c in self.inputs() if self.is_class(c) and self.is_text_by_name(c) and self.tells(c, label)
            ]
            for column in self.leaking:
                self.take(column)
        many = self.one_of_many()
        if many:
            words.append(self.take_many(*many))
            shown = {"context": "{value}", "question": _question(task)} if media else {"text": "value"}
            return {"task": task, "each": many[0], "lang": "{key}", **shown, "label": label}, {task: classes}, words
        text = self.text() or (None if media or self.fields(label)[0] else self.any_text())
        if not text and not media and not self.fields(label)[0]:
            raise DataError(
                f"there is no column to learn `{label}` from among {_listed(self.values, 20)}",
                wanted="a column of texts, pictures, sounds, numbers or categories beside it",
                cure="add one, or write scan.yaml by hand after jobs/configs/stamps/scan.yaml",
            )
        entry: dict[str, Any] = {"task": task}
        if text and not media:
            entry["text"] = text
            words.append(f"`{text}` is the text that it is about.")
        else:
            entry["question"] = _question(task)
            if text:
                entry["context"] = text
                words.append(f"`{text}` is text that goes with it.")
        return {**entry, "label": label}, {task: classes}, words

    def ask_written(self, column: str, media: bool) -> tuple[dict[str, Any], dict[str, list[str]], list[str]]:
        """The `ask` entry for a column of too many classes to choose from: each is written out as a text."""
        task = self.task_name(column)
        n = len(self.distinct(column))
        words = [
            f"`{column}` is what to answer; with {n:,} different ones among {len(self.rows):,} rows it is written out."
        ]
        text = None if media else self.text()
        if text:
            words.append(f"`{text}` is the text that it is about.")
            return {"task": task, "text": text, "answer": column}, {task: []}, words
        question = _WHAT if task in _CLASS_WORDS else _question(task)
        return {"task": task, "question": question, "answer": column}, {task: []}, words

    def task_name(self, column: str) -> str:
        """A task's name: of `labels.colour` only the last part counts."""
        return name_of(last_of(column) if column in self.among_answers else column)

    def take_many(self, mapping: str, columns: list[str]) -> str:
        for column in columns:
            self.take(column)
        return f"`{mapping}` holds the text of a row under its language, of which there are {len(columns)}."

    def sparse_words(self, label: str) -> list[str]:
        """What to say about rows without a label, and about a column with a better name that has too few."""
        words = []
        if self.filled(label) < 1:
            share = 100 * (1 - self.filled(label))
            words.append(f"{share:.2g} % of the rows have no `{label}`; they will be refused (`no_target`).")
        for column in self.named(LABEL):
            if self.filled(column) < WELL_FILLED and column not in self.among_answers:
                share = 100 * self.filled(column)
                words.append(f"`{column}` is not asked, since only {share:.2g} % of the rows have one.")
                self.take(column)
        return words

    def label(self, likely: str = "") -> str | None:
        """The column of classes to be answered: `likely` if it is one, else by its name, else the last that may be."""
        for column in [*[c for c in self.single() if c == likely], *self.named(LABEL)]:
            if self.filled(column) < WELL_FILLED:
                continue
            if self.is_class(column):
                return self.take(column)
            if column == self.too_many_classes():
                return None
            if self.is_number(column) and len(self.distinct(column)) > 2:
                raise DataError(
                    f"`{column}` holds {len(self.distinct(column))} different numbers", wanted="classes",
                    cure="predicting a number comes in a later version; make classes of it (such as low, middle, high)",
                )  # fmt: skip
        classes = [c for c in self.single() if self.is_class(c) and self.filled(c) >= WELL_FILLED]
        strings = [c for c in classes if not self.is_number(c) and self.size(c) <= 60]
        strings = [c for c in strings if not self.is_text_by_name(c)] or strings
        whole = [c for c in classes if self.is_number(c) and len(self.distinct(c)) <= 20]
        if not strings and not whole:
            self.require_filled()
            return None
        return self.take((strings or whole)[-1])

    def require_filled(self) -> None:
        """Raise DataError when the only label there is has too few values."""
        for column in self.named(LABEL):
            if self.filled(column) < WELL_FILLED and self.is_class(column):
                empty = 1 - self.filled(column)
                raise DataError(
                    f"`{column}` is empty in {100 * empty:.0f} % of the rows",
                    wanted=f"classes in at least {100 * WELL_FILLED:.0f} % of them",
                    cure=f"remove the other rows, or write scan.yaml by hand with error_budget: {empty + 0.01:.2f}",
                )

    def too_many_classes(self) -> str | None:
        """A column that bears the name of a label but holds so many different short texts that they are to be written."""
        found = [c for c in self.named(LABEL) if self.filled(c) >= WELL_FILLED and not self.is_number(c)]
        return next((c for c in found if len(self.distinct(c)) > MOST_CLASSES and self.size(c) <= 200), None)


def _question(task: str) -> dict[str, str]:
    if task in _CLASS_WORDS:
        return {"en": "Which class is this?", "zh": "这是哪一类？"}
    return {"en": f"What is the {task.replace('_', ' ')}?", "zh": f"“{task}”是什么？"}
