"""Tables, looked at: which column is what."""

from __future__ import annotations

import os
import re
from itertools import islice
from pathlib import Path
from typing import Any

from mmlm.corpus.drafts import SPLIT_NAMES, Refusal, RefuseError, as_label, as_text, media_part
from mmlm.corpus.guess import Guess, _listed, measure, spread
from mmlm.corpus.readers.rows import read_rows
from mmlm.corpus.select import find
from mmlm.corpus.sniff import AUDIO_ENDINGS, IMAGE_ENDINGS, sniff
from mmlm.errors import DataError
from mmlm.storage import is_remote

ROWS = 2_000
"""Rows of a table that are looked at."""
MOST_CLASSES = 200
_ID = {"id", "key", "uid", "uuid", "index", "idx", "no", "nr", "number", "record_id", "sample_id", "row"}
_GROUP = {
    "group", "patient", "patient_id", "subject", "subject_id", "speaker", "speaker_id", "session", "client_id",
    "author", "family", "writer", "user", "user_id", "participant", "participant_id",
}  # fmt: skip
_LANG = {"lang", "language", "locale", "lang_code"}
_SPLIT = {"split", "set", "subset", "partition", "fold", "usage"}
_QUESTION = {"question", "prompt", "instruction", "query", "input", "q"}
_ANSWER = {
    "answer", "output", "response", "completion", "reply", "target_text", "translation",
    "caption", "transcript", "summary", "a",
}  # fmt: skip
_TEXT = {"text", "caption", "title", "description", "sentence", "review", "comment", "body", "content", "message", "en"}
_LABEL = (
    "label", "class", "category", "target", "diagnosis", "outcome", "sentiment", "species", "genre", "emotion",
    "intent", "topic", "result", "y", "type", "kind", "tag",
)  # fmt: skip


def look_at_tables(data: Path, names: list[str]) -> Guess:
    """What the tables `names` (relative to folder `data`) hold. Raises DataError when no target can be found."""
    groups = _one_table(data, names)
    rows: list[Any] = []
    total = 0
    for name, _ in groups:
        for at, row in enumerate(read_rows(data / name, name)):
            total += 1
            if at < ROWS and not isinstance(row, Refusal):
                rows.append(row[1])
    rows = [r for r in rows if isinstance(r, dict)]
    shown = ", ".join(name for name, _ in groups)
    if not rows:
        raise DataError(
            f"{shown} has no rows that can be read", wanted="rows with named columns", cure="check the file"
        )
    if sum("messages" in r or "conversations" in r for r in rows) > len(rows) / 2:
        return _chat(data, groups, rows, total)
    return _Columns(data, groups, rows, total).guess()


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


def _chat(data: Path, groups: list[tuple[str, str]], rows: list[dict[str, Any]], total: int) -> Guess:
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
    sizes["text_chars"] = spread([sum(len(p.text or "") for p in r.parts) + len(r.target.text or "") for r in records])
    says = [f"{_listed(n for n, _ in groups)}: {total:,} chat records, each with a question and an answer.", *seen]
    says.append(_split_words(groups, "split" if any(r.split for r in records) else None))
    source_yaml = {"kind": "chat", **({"root": root} if root else {})}
    return Guess(
        "chat", data, {"sources": _sources(groups, source_yaml)}, {t: sorted(v) for t, v in sorted(tasks.items())},
        tuple(sorted({m for r in records for m in r.modalities()})), sizes, {"records": total}, says,
    )  # fmt: skip


class _Columns:
    """The columns of a table (nested ones by their selectors) and what each of them is."""

    def __init__(self, data: Path, groups: list[tuple[str, str]], rows: list[dict[str, Any]], total: int) -> None:
        self.data, self.groups, self.rows, self.total = data, groups, rows, total
        self.values = {c: [v for r in rows for v in find(r, c)[:1]] for c in _flat(rows)}
        self.values = {c: [v for v in vs if v != ""] for c, vs in self.values.items()}
        self.values = {c: vs for c, vs in self.values.items() if vs}
        self.free = list(self.values)
        self.root = ""

    def take(self, column: str | None) -> str | None:
        if column:
            self.free.remove(column)
        return column

    def named(self, names: set[str] | tuple[str, ...]) -> list[str]:
        """Free columns whose name (its last part) is one of `names`, in the order of a tuple."""
        found = [c for c in self.single() if _last(c) in names]
        return sorted(found, key=lambda c: names.index(_last(c))) if isinstance(names, tuple) else found

    def texts(self, column: str) -> list[str]:
        found = []
        for value in self.values[column]:
            try:
                found.append(as_text(value) or "")
            except RefuseError:
                return []
        return found

    def distinct(self, column: str) -> set[str]:
        return set(self.texts(column))

    def media(self, kind: str) -> str | None:
        endings = IMAGE_ENDINGS if kind == "image" else AUDIO_ENDINGS
        for column in self.free:
            values = self.values[column][:200]
            hits = sum(_is_media(v, kind, endings) for v in values)
            if hits * 2 > len(values):
                return self.take(column)
        return None

    def find_root(self, columns: list[str]) -> None:
        """Choose the folder that most media paths are relative to."""
        paths = [v for c in columns for v in self.values[c][:100] if isinstance(v, str) and not v.startswith("data:")]
        paths += [
            w for c in columns for v in self.values[c][:100] if isinstance(v, list) for w in v[:1] if isinstance(w, str)
        ]
        if not paths:
            return
        here = os.path.dirname(self.groups[0][0])
        below = [e.name for e in os.scandir(self.data / here) if e.is_dir() and not e.name.startswith(".")]
        roots = ["", *([here] if here else []), *sorted(os.path.join(here, b) for b in below)]
        there = {root: sum(os.path.isfile(os.path.join(self.data, root, p)) for p in paths) for root in roots}
        self.root = max(roots, key=lambda r: there[r])
        if not there[self.root] and (above := self._above(paths)):
            # such as corpora/stamps/manifest.jsonl with paths relative to corpora/
            self.groups = [(os.path.relpath(self.data / name, above), split) for name, split in self.groups]
            self.data, self.root = above, ""
        elif not there[self.root]:
            raise DataError(
                f"`{columns[0]}` names files such as {paths[0]!r}, but they are not below {self.data}",
                wanted="paths relative to the table's folder",
                cure="give the folder that holds the table and its media",
            )  # fmt: skip

    def _above(self, paths: list[str]) -> Path | None:
        """One of the two folders above the data, if the media paths are relative to it."""
        for folder in list(self.data.absolute().parents)[:2]:
            if any(os.path.isfile(folder / p) for p in paths):
                return folder
        return None

    def roles(self) -> dict[str, str]:
        """map key → column, for the columns that are about the row itself."""
        found: dict[str, str] = {}
        for kind in ("image", "audio"):
            if column := self.media(kind):
                found[kind] = column
        self.find_root([found[k] for k in ("image", "audio") if k in found])
        for key, names in (("split", _SPLIT), ("lang", _LANG), ("license", {"license", "licence"}), ("group", _GROUP)):
            for column in self.named(names):
                ok = {v.strip().lower() for v in self.distinct(column)}
                if key == "split" and not ok <= set(SPLIT_NAMES):
                    continue
                if key == "lang" and max(map(len, ok), default=99) > 12:
                    continue
                found[key] = column
                self.take(column)
                break
        for column in self.named(_ID):
            if len(self.distinct(column)) == len(self.rows):
                found["id"] = column
                self.take(column)
                break
        return found

    def is_number(self, column: str) -> bool:
        texts = [t for t in self.texts(column) if t]
        return bool(texts) and all(re.fullmatch(r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*", t) for t in texts[:500])

    def is_class(self, column: str) -> bool:
        """Few values, each of them several times."""
        n, kinds = len(self.texts(column)), len(self.distinct(column))
        fractions = self.is_number(column) and any(not float(t).is_integer() for t in self.distinct(column) if t)
        return 2 <= kinds <= min(MOST_CLASSES, max(2, n // 2)) and not fractions

    def label(self) -> str | None:
        for column in self.named(_LABEL):
            if self.is_class(column):
                return self.take(column)
            if self.is_number(column) and len(self.distinct(column)) > 2:
                raise DataError(
                    f"`{column}` holds {len(self.distinct(column))} different numbers", wanted="classes",
                    cure="predicting a number comes in a later version; make classes of it (such as low, middle, high)",
                )  # fmt: skip
        strings = [c for c in self.single() if self.is_class(c) and not self.is_number(c) and self.chars(c) <= 40]
        whole = [c for c in self.single() if self.is_class(c) and self.is_number(c) and len(self.distinct(c)) <= 20]
        return self.take((strings or whole)[-1]) if strings or whole else None

    def chars(self, column: str) -> float:
        texts = self.texts(column) or [""]
        return sum(map(len, texts)) / len(texts)

    def text(self) -> str | None:
        """The column of the longest texts, if they are texts."""
        most = max((len(self.values[c]) for c in self.free), default=0)
        found = [c for c in self.single() if not self.is_number(c) and self.chars(c) >= 12]
        found = [c for c in found if 2 * len(self.values[c]) >= most and len(self.distinct(c)) > 2]
        named = [c for c in found if _last(c) in _TEXT]
        return self.take(max(named or found, key=self.chars)) if found else None

    def single(self) -> list[str]:
        return [c for c in self.free if "[" not in c]

    def tells(self, column: str, label: str) -> bool:
        """Whether a column of words gives the label away: each of its values goes with one label only."""
        seen: dict[str, set[str]] = {}
        for row in self.rows:
            pair = [str(v[0]) for c in (column, label) if (v := find(row, c))]
            if len(pair) == 2:
                seen.setdefault(pair[0], set()).add(pair[1])
        return not self.is_number(column) and len(seen) > 1 and all(len(s) == 1 for s in seen.values())

    def guess(self) -> Guess:
        roles = self.roles()
        ask, tasks, words = self.ask(roles)
        fields = {_name(c): c for c in self.single() if self.is_number(c) or self.is_class(c)}
        label = ask.get("label")
        if given_away := [n for n, c in fields.items() if label and self.tells(c, label)]:
            words.append(f"Left out because they give `{label}` away: {_listed(given_away)}.")
            fields = {n: c for n, c in fields.items() if n not in given_away}
        ignored = [c for c in self.free if c not in fields.values()]
        columns: dict[str, Any] = dict(roles)
        if fields:
            columns["fields"] = fields
        source: dict[str, Any] = {"kind": "table", **({"root": self.root} if self.root else {})}
        source |= {"map": columns, "ask": [ask]}
        media = {k: self.items(roles.get(k), k) for k in ("image", "audio")}
        sizes, seen = measure(media["image"], media["audio"])
        written = [c for c in (ask.get("text"), ask.get("context")) if c]
        if written:
            sizes["text_chars"] = spread([len(t) for t in self.texts(written[0])])
        modalities = {k for k in ("image", "audio") if k in roles} | ({"fields"} if fields else set()) | {"text"}
        modalities |= {"context"} if "context" in ask else set()
        says = [f"{_listed(n for n, _ in self.groups)}: a table of {self.total:,} rows.", *words]
        says += [f"`{c}` holds {'pictures' if k == 'image' else 'sounds'}." for k, c in roles.items() if k in media]
        says += [f"`{c}` is the {k}." for k, c in roles.items() if k in ("id", "group", "lang", "license")]
        if fields:
            says.append(f"{len(fields)} columns are taken as named values: {_listed(fields)}.")
        if ignored:
            says.append(f"Not used: {_listed(ignored)}.")
        says += [*seen, _split_words(self.groups, roles.get("split"))]
        return Guess(
            "table", self.data, {"sources": _sources(self.groups, source)}, tasks, tuple(sorted(modalities)), sizes,
            {"records": self.total}, says,
        )  # fmt: skip

    def ask(self, roles: dict[str, str]) -> tuple[dict[str, Any], dict[str, list[str]], list[str]]:
        """The one question to ask: (`ask` entry, task → classes, words)."""
        asked = next(iter(self.named(_QUESTION)), None)
        answer = next((c for c in self.named(_ANSWER) if c != asked and not self.is_number(c)), None)
        if asked and answer:
            self.take(asked), self.take(answer)
            entry: dict[str, Any] = {"task": "answer", "text": asked, "answer": answer}
            return entry, {"answer": []}, [f"`{asked}` is the question and `{answer}` its answer, to be written."]
        media = "image" in roles or "audio" in roles
        label = self.label()
        if label:
            task = _name(label)
            classes = sorted({as_label(t) or "" for t in self.distinct(label)} - {""})
            words = [f"`{label}` is what to answer, {len(classes)} classes: {_listed(classes)}."]
            entry = {"task": task}
            text = self.text()
            if text and not media:
                entry["text"] = text
                words.append(f"`{text}` is the text that it is about.")
            else:
                entry |= {"question": {"en": f"What is the {task.replace('_', ' ')}?", "zh": f"“{task}”是什么？"}}
                if text:
                    entry["context"] = text
                    words.append(f"`{text}` is text that goes with it.")
            return {**entry, "label": label}, {task: classes}, words
        written = answer if answer else self.text() if media else None
        if written and media:
            if answer:
                self.take(answer)
            entry = {"task": "describe", "question": {"en": "What is this?", "zh": "这是什么？"}, "answer": written}
            return entry, {"describe": []}, [f"`{written}` is the text to be written about each."]
        raise DataError(
            f"no column to be answered among {_listed(self.values, 20)}",
            wanted="a column of classes (such as `label`), or the columns `question` and `answer`",
            cure="name the column `label`, or write scan.yaml by hand after jobs/configs/stamps/scan.yaml",
        )

    def items(self, column: str | None, kind: str) -> list[Any]:
        """Bytes or absolute paths of the media in a column."""
        found: list[Any] = []
        for value in self.values[column][:ROWS] if column else []:
            one = value[0] if isinstance(value, list) and value else value
            try:
                part = media_part(kind, one, self.root)
            except RefuseError:
                continue
            found.append(part.data if part.uri is None else self.data / part.uri)
        return found


def _flat(rows: list[dict[str, Any]]) -> list[str]:
    """Selectors of all leaves in the first rows, two levels deep, in order of appearance."""
    found: dict[str, None] = {}
    for row in rows[:200]:
        for key, value in row.items():
            if isinstance(value, dict) and "bytes" not in value and len(value) <= 100:
                found |= {f"{key}.{inner}": None for inner, v in value.items() if not isinstance(v, dict | list)}
            elif isinstance(value, list) and value and isinstance(value[0], dict):
                found |= {f"{key}[].{inner}": None for inner, v in value[0].items() if isinstance(v, str)}
            else:
                found[str(key)] = None
    return list(found)


def _is_media(value: Any, kind: str, endings: tuple[str, ...]) -> bool:
    if isinstance(value, list):
        return bool(value) and _is_media(value[0], kind, endings)
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return sniff(value[:4096])[0] == kind
    return isinstance(value, str) and (value.lower().endswith(endings) or value.startswith(f"data:{kind}/"))


def _last(column: str) -> str:
    return re.split(r"[.\[\]]+", column.strip().lower())[-1].replace(" ", "_").replace("-", "_")


def _name(column: str) -> str:
    """A task's or field's name after a column: words joined by underscores."""
    return re.sub(r"[^\w]+", "_", column).strip("_").lower() or "value"
