"""Tables, looked at: what is asked of their rows."""

from __future__ import annotations

import os
import re
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

from mmlm.corpus.columns import ANSWER, LABEL, QUESTION, ROWS, WELL_FILLED, Columns, drawn_rows, last_of, name_of
from mmlm.corpus.drafts import SPLIT_NAMES, Refusal, as_label
from mmlm.corpus.elsewhere import filled
from mmlm.corpus.guess import Guess, _listed, measure, text_sizes
from mmlm.corpus.readers.delimited import csv_encoding
from mmlm.corpus.readers.hf_columns import TRANSCRIBE
from mmlm.corpus.readers.rows import read_rows
from mmlm.corpus.records import Target
from mmlm.corpus.select import find
from mmlm.errors import DataError
from mmlm.storage import is_remote

_CLASS_WORDS = {"label", "class", "target", "category", "y", "标签", "类别", "分类"}
"""Names of a label that say nothing about what is asked."""
_WHAT = {"en": "What is this?", "zh": "这是什么？"}


def look_at_tables(data: Path, names: list[str]) -> Guess:
    """What the tables `names` (relative to folder `data`) hold. Raises DataError when no target can be found."""
    groups = _one_table(data, names)
    rows, totals = {}, {}
    for name, _ in groups:
        rows[name], totals[name] = _sampled_rows(data, name)
    shown = ", ".join(name for name, _ in groups)
    if not any(rows.values()):
        raise _no_row(data, [name for name, _ in groups], shown)
    every = [r for found in rows.values() for r in found]
    says = [f"{n} is not UTF-8; it is read as {read_as}." for n in rows if (read_as := _other_encoding(data / n))]
    if sum("messages" in r or "conversations" in r for r in every) > len(every) / 2:
        return _chat(data, groups, every, sum(totals.values()), says)
    likely = _only_in_training(groups, rows)
    groups, without = _with_target(groups, rows, likely or _target_of(data, groups, rows))
    if without:
        says.append(f"Left out, since nothing in it is labelled: {_listed(without)}.")
    return _Table(data, groups, [rows[name] for name, _ in groups], sum(totals[n] for n, _ in groups)).guess(
        likely, says
    )


def _sampled_rows(data: Path, name: str) -> tuple[list[dict[str, Any]], int]:
    """(at most ROWS rows in their order, number of all rows)."""
    return drawn_rows(read_rows(filled(data / name), name))


def _no_row(data: Path, names: list[str], shown: str) -> DataError:
    """Of tables without a single row that can be read: the reason of the first refusal, if there was one."""
    for name in names:
        for row in read_rows(filled(data / name), name):
            if isinstance(row, Refusal):
                cure = (
                    "save it as UTF-8 (a spreadsheet offers `CSV UTF-8`), or `iconv -f cp1251 -t utf-8`"
                    if row.reason == "bad_encoding"
                    else "check the file"
                )
                return DataError(f"no row of {shown} can be read: {row.source}: {row.detail}", cure=cure)
    return DataError(f"{shown} has no rows", wanted="rows with named columns", cure="check the file")


def _other_encoding(path: Path) -> str | None:
    """What a table that is not UTF-8 is read as, for people."""
    names = {"utf-16": "UTF-16", "gb18030": "GB18030 (GBK)", "cp1252": "Windows-1252 (Western European)"}
    return names.get(csv_encoding(path)) if path.suffix.lower() in (".csv", ".tsv") else None


def _only_in_training(groups: list[tuple[str, str]], rows: dict[str, list[dict[str, Any]]]) -> str:
    """The one column that the training table has and another lacks, as where a contest hides the answers; else ""."""
    seen = {name: {str(k) for r in rows[name] for k, v in r.items() if v not in ("", None)} for name, _ in groups}
    training = next((name for name, split in groups if split == "train"), "")
    for columns in seen.values():
        lacking = seen.get(training, columns) - columns
        if columns and len(lacking) == 1 and not {last_of(c) for c in columns} & {*LABEL, *ANSWER}:
            return next(iter(lacking))
    return ""


def _target_of(data: Path, groups: list[tuple[str, str]], rows: dict[str, list[dict[str, Any]]]) -> str:
    """What would be answered if there were only the training table; "" with a single table."""
    if len(groups) == 1:
        return ""
    training = next((g for g in groups if g[1] == "train"), groups[0])
    ask = _Table(data, [training], [rows[training[0]]], 0).guess("", []).scan["sources"][0]["ask"][0]
    return str(ask.get("label") or ask.get("answer") or "")


def _with_target(
    groups: list[tuple[str, str]], rows: dict[str, list[dict[str, Any]]], target: str
) -> tuple[list[tuple[str, str]], list[str]]:
    """(the tables that have something at `target`, the names of the others). One that is left is split by hash."""
    kept = [g for g in groups if not target or any(v != "" for r in rows[g[0]] for v in find(r, target))]
    without = [g[0] for g in groups if g not in kept]
    if not kept:
        return groups, []
    return ([(kept[0][0], "")] if without and len(kept) == 1 else kept), without


def _one_table(data: Path, names: list[str]) -> list[tuple[str, str]]:
    """(file, split) of the tables that belong together: one, or one per split."""
    if len(names) > 1:  # not what lies beside a table, such as a JSON file of settings
        names = [n for n in names if _row_count(data, n) >= 2] or names
    if len(names) == 1:
        return [(names[0], "")]
    found = []
    for name in names:
        words = re.split(r"[^a-z]+", Path(name).stem.lower())
        found.append((name, next((SPLIT_NAMES[w] for w in words if w in SPLIT_NAMES), "")))
    with_split = [(n, s) for n, s in found if s]
    if {"train"} <= {s for _, s in with_split}:
        return with_split
    raise DataError(
        f"{data} holds {len(names)} tables: {_listed(names, 6)}", wanted="one, or one per split (train, val, test)",
        cure="give the file itself: --data FILE",
    )  # fmt: skip


def _row_count(data: Path, name: str) -> int:
    """Rows with columns among the first two."""
    return sum(
        not isinstance(r, Refusal) and isinstance(r[1], dict) for r in islice(read_rows(filled(data / name), name), 2)
    )


def _sources(groups: list[tuple[str, str]], source: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {**{k: v for k, v in source.items() if k == "kind"}, "files": name, **({"split": split} if split else {}),
         **{k: v for k, v in source.items() if k != "kind"}}
        for name, split in groups
    ]  # fmt: skip


def _split_words(groups: list[tuple[str, str]], column: str | None) -> str:
    if column:
        return f"`{column}` says the split; it is kept."
    if any(split for _, split in groups):
        return "The files' names say the split; it is kept."
    return "No split is given: 10 % for validation and 10 % for test, by a hash."


def _chat(data: Path, groups: list[tuple[str, str]], rows: list[dict[str, Any]], total: int, says: list[str]) -> Guess:
    from mmlm.corpus.config import ChatSource
    from mmlm.corpus.drafts import Draft
    from mmlm.corpus.readers.chat import read_chat

    name = groups[0][0]
    roots = sorted({"", os.path.dirname(name)})
    best: tuple[int, str, list[Any]] = (-1, "", [])
    refused: list[Refusal] = []
    cut = 0
    for root in roots:
        source = ChatSource(kind="chat", files=[name], root=root)
        found = list(islice(read_chat(source, [(name, data / name)], ""), ROWS))
        refused, cut = [d for d in found if isinstance(d, Refusal)], sum(isinstance(d, Draft) and d.cut for d in found)
        drafts = [d.record for d in found if isinstance(d, Draft)]
        there = sum(
            os.path.isfile(data / p.uri) for r in drafts[:200] for p in r.parts if p.uri and not is_remote(p.uri)
        )
        if there > best[0]:
            best = (there, root, drafts)
    _, root, records = best
    if not records:
        why = f": {refused[0].source}: {refused[0].reason}, {refused[0].detail}" if refused else ""
        raise DataError(
            f"{name} looks like chat messages, but none can be read{why}",
            wanted="messages of which the last is the assistant's",
            cure="check the file, or write scan.yaml by hand",
        )
    tasks: dict[str, set[str]] = {}
    for r in records:
        tasks.setdefault(r.task, set()).update([r.target.label] if r.target.label else [])
    media = {
        k: [p.data or data / (p.uri or "") for r in records for p in r.parts if p.kind == k] for k in ("image", "audio")
    }
    sizes, seen = measure(media["image"], media["audio"])
    sizes["text_bytes"] = text_sizes(
        [_bytes_of([*(p.text or "" for p in r.parts), _answer(r.target)]) for r in records]
    )
    for kind in media:
        sizes[f"{kind}s_each"] = max(sum(p.kind == kind for p in r.parts) for r in records)
    said = f"{_listed(n for n, _ in groups)}: {total:,} chat records, each with a question and an answer."
    says = [said, *says, *seen]
    says.append(_split_words(groups, "split" if any(r.split for r in records) else None))
    ids = [str(r["id"]) for r in rows if r.get("id") not in (None, "")]
    repeated = len(set(ids)) < len(ids)
    if repeated:
        says.append("Ids repeat: each is taken for a group, and every record is named by its content (`id: hash`).")
    if cut:
        says.append(f"{cut:,} of {len(records):,} go on after the assistant's last message; that is left out.")
    if refused:
        reasons = Counter(r.reason for r in refused)
        says.append(f"Refused when scanning: {_listed(f'{n:,} {reason}' for reason, n in sorted(reasons.items()))}.")
    source_yaml = {"kind": "chat", **({"root": root} if root else {}), **({"id": "hash"} if repeated else {})}
    return Guess(
        "chat", data, {"sources": _sources(groups, source_yaml)}, {t: sorted(v) for t, v in sorted(tasks.items())},
        tuple(sorted({m for r in records for m in r.modalities()})), sizes, {"records": total}, says,
    )  # fmt: skip


def _answer(target: Target) -> str:
    return target.text or target.label or ", ".join(target.labels or ())


def _bytes_of(texts: list[str]) -> int:
    return sum(len(t.encode("utf-8", "replace")) for t in texts)


class _Table(Columns):
    """A table, and the `scan` section for it."""

    def guess(self, likely: str, said: list[str]) -> Guess:
        """`likely`: the column that is probably the answer; `said`: what was said about the files."""
        roles = self.roles()
        ask, tasks, words = self.ask(roles, likely)
        label = ask.get("label")
        # a question and its answer stand for themselves; what else a row has is about the row
        fields, given_away = self.fields(label) if label or "text" not in ask else ({}, [])
        given_away += [name_of(c) for c in self.leaking]
        if given_away:
            words.append(f"Left out because they give `{label}` away: {_listed(given_away)}.")
        ignored = [c for c in self.free if c not in fields.values() and name_of(c) not in given_away] + self.odd
        answers = [c for c in ignored if c in self.other_answers()]
        ignored = [c for c in ignored if c not in answers]
        columns: dict[str, Any] = dict(roles)
        if fields:
            columns["fields"] = fields
        source: dict[str, Any] = {"kind": "table", **({"root": self.root} if self.root else {})}
        source |= {"map": columns, "ask": [ask]}
        media = {k: self.items(roles.get(k), k) for k in ("image", "audio")}
        sizes, seen = measure(media["image"], media["audio"])
        sizes["text_bytes"] = text_sizes([self.written(row, ask) for row in self.rows])
        sizes["fields"] = len(fields)
        modalities = {k for k in ("image", "audio") if k in roles} | ({"fields"} if fields else set()) | {"text"}
        modalities |= {"context"} if "context" in ask else set()
        says = [f"{_listed(n for n, _ in self.groups)}: a table of {self.total:,} rows.", *said, *words]
        says += [f"`{c}` holds {'pictures' if k == 'image' else 'sounds'}." for k, c in roles.items() if k in media]
        about = {k: c for k, c in roles.items() if k in ("id", "group", "lang", "license")}
        if plain := [f"`{c}`" for k, c in about.items() if c == k]:
            says.append(
                f"Taken for what {'its name says' if len(plain) == 1 else 'their names say'}: {', '.join(plain)}."
            )
        says += [f"`{c}` is the {k}." for k, c in about.items() if c != k]
        if fields:
            says.append(f"Taken as named values: {_listed(fields)}.")
        if answers:
            says.append(f"Other answers, not asked and never given to the model: {_listed(f'`{c}`' for c in answers)}.")
        if ignored:
            says.append(f"Not used: {_listed(f'`{c}`' for c in ignored)}.")
        says += [*seen, _split_words(self.groups, roles.get("split"))]
        return Guess(
            "table", self.data, {"sources": _sources(self.groups, source)}, tasks, tuple(sorted(modalities)), sizes,
            {"records": self.total}, says,
        )  # fmt: skip

    def written(self, row: dict[str, Any], ask: dict[str, Any]) -> int:
        """UTF-8 bytes of all words of a row's record: text, context, question, answer."""
        if "each" in ask:
            row = {**row, "value": next((v for held in find(row, ask["each"])[:1] for v in held.values()), "")}
        places = [str(ask[k]).strip("{}") for k in ("text", "context", "answer", "label") if ask.get(k)]
        cells = [str(v) for place in places for v in find(row, place)[:1]]
        return _bytes_of([*cells, max((ask.get("question") or {"en": ""}).values(), key=lambda q: len(q.encode()))])

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


def _question(task: str) -> dict[str, str]:
    if task in _CLASS_WORDS:
        return {"en": "Which class is this?", "zh": "这是哪一类？"}
    return {"en": f"What is the {task.replace('_', ' ')}?", "zh": f"“{task}”是什么？"}
