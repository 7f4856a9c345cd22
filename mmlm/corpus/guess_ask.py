"""What is asked of the rows of a table."""

from __future__ import annotations

from typing import Any

from mmlm.corpus.column_names import (
    ANSWER,
    ANSWERS,
    CONTEXT,
    LABEL,
    LABEL_LISTS,
    PAIRS,
    QUANTITIES,
    QUESTION,
    SPOKEN,
    TARGETS,
    is_no_label,
    last_of,
    name_of,
)
from mmlm.corpus.columns import MOST_CLASSES, WELL_FILLED, Columns
from mmlm.corpus.drafts import as_label, as_labels
from mmlm.corpus.guess import _listed
from mmlm.corpus.readers.hf_columns import TRANSCRIBE
from mmlm.corpus.select import find
from mmlm.errors import DataError

_CLASS_WORDS = {"label", "class", "target", "category", "y", "标签", "类别", "分类"}
"""Names of a label that say nothing about what is asked."""
_CERTAIN_CLASSES = _CLASS_WORDS - {"target", "y"}
"""Names under which even many whole numbers are hardly a quantity."""
_WHAT = {"en": "What is this?", "zh": "这是什么？"}

Ask = dict[str, Any]
Asking = tuple[Ask, dict[str, list[str]], list[str]]
"""(`ask` entry, task → classes, what to say)."""


class Asked(Columns):
    """Columns, and the one question that is asked of their rows."""

    def ask(self, roles: dict[str, str], likely: str) -> Asking:
        """The one question to ask. Raises DataError when there is none."""
        if answered := self.ask_answer():
            return answered
        answer = next((c for c in self.named(ANSWER) if not self.is_number(c)), None)
        media, heard = "image" in roles or "audio" in roles, "audio" in roles and "image" not in roles
        if target := self.target(likely, heard):
            return self.ask_target(*target, media)
        if answer:
            self.take(answer)
            text = None if media else self.text()
            if text:
                entry = {"task": "answer", "text": text, "answer": answer}
                return entry, {"answer": []}, [f"`{text}` is what to read and `{answer}` what to write."]
        written = answer if answer else self.text() if media else None
        if written and media:
            return self.ask_about_media(written, heard)
        if number := self.quantity(last_only=False):
            return self.ask_about("number", number, media)
        raise DataError(
            f"no column to be answered among {_listed(self.values, 20)}",
            wanted="a column of classes (such as `label`), or the columns `question` and `answer`",
            cure="name the column `label`, or write scan.yaml by hand after jobs/configs/stamps/scan.yaml",
        )

    def ask_answer(self) -> Asking | None:
        """The entry for a question and its answer, where the rows have both; beside them often a context."""
        questions = sorted(self.named(QUESTION), key=lambda c: last_of(c) in CONTEXT)  # `input` only without another
        asked = next(iter(questions), None)
        answer = next((c for c in self.named(ANSWER) if c != asked and not self.is_number(c)), None)
        if not asked or not (written := answer or self.first_answer()):
            return None
        self.take(asked)
        if answer:
            self.take(answer)
        entry: Ask = {"task": "answer", "text": asked}
        words = [f"`{asked}` is the question and `{written}` its answer, to be written."]
        if context := next((c for c in self.named(CONTEXT) if not self.is_number(c)), None):
            entry["context"] = self.take(context)
            words.append(f"`{context}` is text that goes with it.")
        if answer is None or self.filled(answer) < 1:
            words += self.without_words(written)
        return {**entry, "answer": written}, {"answer": []}, words

    def first_answer(self) -> str | None:
        """The selector of the first of several right answers, such as `answers.text[0]`.

        Raises DataError when too few rows have one.
        """
        for name in ANSWERS:
            for selector in (f"{name}.text[0]", f"{name}[0].text", f"{name}[0]"):
                held = self.share(selector)
                if not held:
                    continue
                if held < WELL_FILLED:
                    raise _too_empty(selector, held, "an answer")
                for column in [c for c in self.free if c == name or c.startswith((f"{name}.", f"{name}["))]:
                    self.take(column)
                return selector
        return None

    def share(self, selector: str) -> float:
        """Share of the rows that have a text at a selector."""
        held = sum(any(isinstance(v, str) and v.strip() for v in find(r, selector)) for r in self.rows)
        return held / max(1, len(self.rows))

    def target(self, likely: str, heard: bool) -> tuple[str, str, list[str]] | None:
        """(label, labels, number, spoken or written; the column; what to say about the choice) of what is to be answered:
        by its name, else by what it holds, else the last column of classes."""
        if found := self.by_name(likely):
            return (*found, [])
        if heard and (spoken := self.spoken()):
            return "spoken", spoken, []
        if column := self.label_list():
            return "labels", column, []
        if number := self.quantity(last_only=True):
            return "number", number, []
        return self.by_place()

    def by_name(self, likely: str) -> tuple[str, str] | None:
        """(kind, column) of `likely`, or of a column that is called as what is to be answered usually is."""
        for column in [*[c for c in self.single() if c == likely], *self.named(LABEL), *self.named(TARGETS)]:
            if self.filled(column) < WELL_FILLED:
                continue
            if self.is_class(column):
                return "label", column
            if column == self.too_many_classes():
                return "written", column
            if self.is_quantity(column):
                kinds = len(self.distinct(column))
                if last_of(column) in _CERTAIN_CLASSES and not self.has_fractions(column):
                    raise DataError(
                        f"`{column}` holds {kinds} different numbers", wanted=f"at most {MOST_CLASSES} classes",
                        cure="call them by names; or, if it is a quantity, call the column `target`",
                    )  # fmt: skip
                return "number", column
        return None

    def by_place(self) -> tuple[str, str, list[str]] | None:
        """The last column of classes whose name does not say that it is something else."""
        paired = set(self.pair() or ())
        classes = [c for c in self.single() if self.is_class(c) and self.filled(c) >= WELL_FILLED]
        classes = [c for c in classes if c not in paired and not is_no_label(c)]
        strings = [c for c in classes if not self.is_number(c) and self.size(c) <= 60]
        strings = [c for c in strings if not self.is_text_by_name(c)] or strings
        whole = [c for c in classes if self.is_number(c) and len(self.distinct(c)) <= 20]
        if not strings and not whole:
            self.require_filled()
            return None
        chosen = (strings or whole)[-1]
        others = [f"`{c}`" for c in [*strings, *whole] if c != chosen]
        words = [f"`{chosen}` is asked for its place only, since no column is called as a label is."]
        if others:
            words = [f"{words[0]} {_listed(others)} could be asked as well: change `ask` in scan.yaml."]
        return "label", chosen, words

    def spoken(self) -> str | None:
        """The column of what is said in the sounds. A few short words that repeat are rather classes."""
        found = [c for c in self.named(SPOKEN) if self.filled(c) >= WELL_FILLED and not self.is_number(c)]
        return next((c for c in found if not self.is_class(c) or self.size(c) >= 12), None)

    def label_list(self) -> str | None:
        """A column of lists of classes, of which several may hold of a row, or none."""
        for column in self.named(LABEL_LISTS):
            lists = [v for v in self.values[column] if isinstance(v, list)]
            items = [x for v in lists for x in v]
            if len(lists) < WELL_FILLED * len(self.rows) or not all(isinstance(x, str | int) for x in items):
                continue
            if 2 <= len({as_label(x) for x in items}) <= min(MOST_CLASSES, len(items) // 2):
                return column
        return None

    def quantity(self, last_only: bool) -> str | None:
        """A column of numbers to be predicted: the last one, if its name says so; else (not `last_only`) any that is so
        called, or the last one if it has fractions."""
        last = next(reversed(self.values), "")
        numbers = [c for c in self.single() if self.is_quantity(c) and self.filled(c) >= WELL_FILLED]
        named = [c for c in numbers if last_of(c) in QUANTITIES]
        if last_only:
            return last if last in named else None
        fractions = [c for c in numbers if c == last and self.has_fractions(c) and not is_no_label(c)]
        return next(iter([*named[-1:], *fractions]), None)

    def is_quantity(self, column: str) -> bool:
        return self.is_number(column) and len(self.distinct(column)) > 2

    def pair(self) -> tuple[str, str] | None:
        """Two columns whose names say that they are texts to be read together."""
        free = {last_of(c): c for c in self.inputs() if not self.is_number(c)}
        return next(((free[a], free[b]) for a, b in PAIRS if a in free and b in free), None)

    def ask_target(self, kind: str, column: str, words: list[str], media: bool) -> Asking:
        """The entry for a column that `target` chose."""
        if kind == "spoken":
            self.take(column)
            return self.ask_about_media(column, True)
        if kind == "written":
            self.take(column)
            return self.ask_written(column, media)
        entry, tasks, said = self.ask_about(kind, column, media)
        return entry, tasks, [said[0], *words, *said[1:]]

    def ask_about_media(self, written: str, heard: bool) -> Asking:
        """The entry for a text to be written about each picture or sound."""
        task, wording = ("transcript", TRANSCRIBE) if heard else ("describe", _WHAT)
        words = [f"`{written}` is the text to be written about each.", *self.sparse_words(written)]
        return {"task": task, "question": wording, "answer": written}, {task: []}, words

    def ask_about(self, kind: str, column: str, media: bool) -> Asking:
        """The entry for a column of classes (`label`), lists of them (`labels`) or a number (`number`)."""
        self.take(column)
        task = self.task_name(column)
        classes, said = self.answers(kind, column)
        words = [said, *self.sparse_words(column)]
        label = column if kind == "label" else None
        if media and label:
            self.leaking = [
                c for c in self.inputs() if self.is_class(c) and self.is_text_by_name(c) and self.tells(c, label)
            ]
            for given_away in self.leaking:
                self.take(given_away)
        question = _question(task, kind)
        many = self.one_of_many()
        if many:
            words.append(self.take_many(*many))
            shown = {"context": "{value}", "question": question} if media else {"text": "value"}
            return {"task": task, "each": many[0], "lang": "{key}", **shown, kind: column}, {task: classes}, words
        shown, about = self.shown(label, media, question)
        if not shown:
            raise DataError(
                f"there is no column to learn `{column}` from among {_listed(self.values, 20)}",
                wanted="a column of texts, pictures, sounds, numbers or categories beside it",
                cure="add one, or write scan.yaml by hand after jobs/configs/stamps/scan.yaml",
            )
        return {"task": task, **shown, kind: column}, {task: classes}, [*words, *about]

    def shown(self, label: str | None, media: bool, question: dict[str, str]) -> tuple[Ask, list[str]]:
        """(`text`, `context` and `question` of an entry, what to say about them); nothing where nothing can be read."""
        if not media and (pair := self.pair()):
            for one in pair:
                self.take(one)
            said = f"`{pair[0]}` is the text that it is about, and `{pair[1]}` goes with it."
            return {"text": pair[0], "context": pair[1]}, [said]
        text = self.text() or (None if media or self.fields(label)[0] else self.any_text())
        if not text and not media and not self.fields(label)[0]:
            return {}, []
        if text and not media:
            return {"text": text}, [f"`{text}` is the text that it is about."]
        if text:
            return {"question": question, "context": text}, [f"`{text}` is text that goes with it."]
        return {"question": question}, []

    def answers(self, kind: str, column: str) -> tuple[list[str], str]:
        """(the classes in a column, none for numbers; what to say about them)."""
        if kind == "number":
            numbers = self.numbers(column)
            return [], f"`{column}` is what to answer, a number from {min(numbers):g} to {max(numbers):g}."
        if kind == "labels":
            classes = sorted({c for v in self.values[column] for c in as_labels(v)})
            said = f"`{column}` is what to answer, any of {len(classes)} classes: {_listed(classes)}."
            return classes, said
        classes = sorted({as_label(t) or "" for t in self.distinct(column)} - {""})
        return classes, f"`{column}` is what to answer, {len(classes)} classes: {_listed(classes)}."

    def ask_written(self, column: str, media: bool) -> Asking:
        """The entry for a column of too many classes to choose from: each is written out as a text."""
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

    def without_words(self, answer: str) -> list[str]:
        """What to say about rows without an answer."""
        held = self.filled(answer) if answer in self.values else self.share(answer)
        if held == 1:
            return []
        return [f"{100 * (1 - held):.2g} % of the rows have no `{answer}`; they will be refused (`no_target`)."]

    def sparse_words(self, label: str) -> list[str]:
        """What to say about rows without a label, and about a column with a better name that has too few."""
        words = self.without_words(label)
        for column in self.named(LABEL):
            if self.filled(column) < WELL_FILLED and column not in self.among_answers:
                share = 100 * self.filled(column)
                words.append(f"`{column}` is not asked, since only {share:.2g} % of the rows have one.")
                self.take(column)
        return words

    def require_filled(self) -> None:
        """Raise DataError when the only label there is has too few values."""
        for column in self.named(LABEL):
            if self.filled(column) < WELL_FILLED and self.is_class(column):
                raise _too_empty(column, self.filled(column), "classes")

    def too_many_classes(self) -> str | None:
        """A column that bears the name of a label but holds so many different short texts that they are to be written."""
        found = [c for c in self.named(LABEL) if self.filled(c) >= WELL_FILLED and not self.is_number(c)]
        return next((c for c in found if len(self.distinct(c)) > MOST_CLASSES and self.size(c) <= 200), None)


def _too_empty(column: str, held: float, wanted: str) -> DataError:
    return DataError(
        f"`{column}` is empty in {100 * (1 - held):.0f} % of the rows",
        wanted=f"{wanted} in at least {100 * WELL_FILLED:.0f} % of them",
        cure=f"remove the other rows, or write scan.yaml by hand with error_budget: {1 - held + 0.01:.2f}",
    )


def _question(task: str, kind: str = "label") -> dict[str, str]:
    if kind == "labels":
        return {"en": f"Which {task.replace('_', ' ')} hold?", "zh": f"有哪些“{task}”？"}
    if task in _CLASS_WORDS and kind == "label":
        return {"en": "Which class is this?", "zh": "这是哪一类？"}
    return {"en": f"What is the {task.replace('_', ' ')}?", "zh": f"“{task}”是什么？"}
