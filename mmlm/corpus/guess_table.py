"""Tables, looked at: what is asked of their rows."""

from __future__ import annotations

import os
import re
from itertools import islice
from pathlib import Path
from typing import Any

from mmlm.corpus.columns import ANSWER, LABEL, QUESTION, ROWS, Columns, last_of, name_of
from mmlm.corpus.drafts import SPLIT_NAMES, Refusal, as_label
from mmlm.corpus.guess import Guess, _listed, measure, text_sizes
from mmlm.corpus.readers.rows import csv_encoding, read_rows
from mmlm.corpus.records import Target
from mmlm.corpus.select import find
from mmlm.errors import DataError
from mmlm.storage import is_remote


def look_at_tables(data: Path, names: list[str]) -> Guess:
    """What the tables `names` (relative to folder `data`) hold. Raises DataError when no target can be found."""
    groups = _one_table(data, names)
    rows, totals = {}, {}
    for name, _ in groups:
        rows[name], totals[name] = _first_rows(data, name)
    shown = ", ".join(name for name, _ in groups)
    if not any(rows.values()):
        raise DataError(
            f"{shown} has no rows that can be read", wanted="rows with named columns", cure="check the file"
        )
    every = [r for found in rows.values() for r in found]
    says = [f"{n} is not UTF-8; it is read as GB18030 (GBK)." for n in rows if _is_gb(data / n)]
    if sum("messages" in r or "conversations" in r for r in every) > len(every) / 2:
        return _chat(data, groups, every, sum(totals.values()), says)
    likely = _only_in_training(groups, rows)
    groups, without = _with_target(groups, rows, likely or _target_of(data, groups, rows))
    if without:
        says.append(f"Left out, since nothing in it is labelled: {_listed(without)}.")
    every = [r for name, _ in groups for r in rows[name]]
    return _Table(data, groups, every, sum(totals[n] for n, _ in groups)).guess(likely, says)


def _first_rows(data: Path, name: str) -> tuple[list[dict[str, Any]], int]:
    """(the first ROWS rows, number of all rows)."""
    rows: list[dict[str, Any]] = []
    total = 0
    for row in read_rows(data / name, name):
        total += 1
        if total <= ROWS and not isinstance(row, Refusal) and isinstance(row[1], dict):
            rows.append(row[1])
    return rows, total


def _is_gb(path: Path) -> bool:
    return path.suffix.lower() in (".csv", ".tsv") and csv_encoding(path) == "gb18030"


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
    ask = _Table(data, [training], rows[training[0]], 0).guess("", []).scan["sources"][0]["ask"][0]
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
    return sum(not isinstance(r, Refusal) and isinstance(r[1], dict) for r in islice(read_rows(data / name, name), 2))


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
    for root in roots:
        source = ChatSource(kind="chat", files=[name], root=root)
        drafts = [d.record for d in islice(read_chat(source, [(name, data / name)], ""), ROWS) if isinstance(d, Draft)]
        there = sum(
            os.path.isfile(data / p.uri) for r in drafts[:200] for p in r.parts if p.uri and not is_remote(p.uri)
        )
        if there > best[0]:
            best = (there, root, drafts)
    _, root, records = best
    if not records:
        raise DataError(
            f"{name} looks like chat messages, but none can be read",
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
    source_yaml = {"kind": "chat", **({"root": root} if root else {})}
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
        fields, given_away = self.fields(label)
        if given_away:
            words.append(f"Left out because they give `{label}` away: {_listed(given_away)}.")
        ignored = [c for c in self.free if c not in fields.values() and name_of(c) not in given_away] + self.odd
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
        says += [f"`{c}` is the {k}." for k, c in roles.items() if k in ("id", "group", "lang", "license")]
        if fields:
            says.append(f"Taken as named values: {_listed(fields)}.")
        if ignored:
            says.append(f"Not used: {_listed(f'`{c}`' for c in ignored)}.")
        says += [*seen, _split_words(self.groups, roles.get("split"))]
        return Guess(
            "table", self.data, {"sources": _sources(self.groups, source)}, tasks, tuple(sorted(modalities)), sizes,
            {"records": self.total}, says,
        )  # fmt: skip

    def written(self, row: dict[str, Any], ask: dict[str, Any]) -> int:
        """UTF-8 bytes of all words of a row's record: text, context, question, answer."""
        cells = [str(v) for k in ("text", "context", "answer", "label") if ask.get(k) for v in find(row, ask[k])[:1]]
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
        label = self.label(likely)
        if label:
            task = name_of(label)
            classes = sorted({as_label(t) or "" for t in self.distinct(label)} - {""})
            words = [f"`{label}` is what to answer, {len(classes)} classes: {_listed(classes)}."]
            entry = {"task": task}
            text = self.text() or (None if media or self.fields(label)[0] else self.any_text())
            if not text and not media and not self.fields(label)[0]:
                raise DataError(
                    f"there is no column to learn `{label}` from among {_listed(self.values, 20)}",
                    wanted="a column of texts, pictures, sounds, numbers or categories beside it",
                    cure="add one, or write scan.yaml by hand after jobs/configs/stamps/scan.yaml",
                )
            if text and not media:
                entry["text"] = text
                words.append(f"`{text}` is the text that it is about.")
            else:
                entry |= {"question": {"en": f"What is the {task.replace('_', ' ')}?", "zh": f"“{task}”是什么？"}}
                if text:
                    entry["context"] = text
                    words.append(f"`{text}` is text that goes with it.")
            return {**entry, "label": label}, {task: classes}, words
        if answer:
            self.take(answer)
            text = None if media else self.text()
            if text:
                entry = {"task": "answer", "text": text, "answer": answer}
                return entry, {"answer": []}, [f"`{text}` is what to read and `{answer}` what to write."]
        written = answer if answer else self.text() if media else None
        if written and media:
            entry = {"task": "describe", "question": {"en": "What is this?", "zh": "这是什么？"}, "answer": written}
            return entry, {"describe": []}, [f"`{written}` is the text to be written about each."]
        raise DataError(
            f"no column to be answered among {_listed(self.values, 20)}",
            wanted="a column of classes (such as `label`), or the columns `question` and `answer`",
            cure="name the column `label`, or write scan.yaml by hand after jobs/configs/stamps/scan.yaml",
        )
