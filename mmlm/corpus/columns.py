"""The columns of somebody's table, looked at: which one is what."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mmlm.corpus.drafts import SPLIT_NAMES, RefuseError, as_text, media_part
from mmlm.corpus.select import check_selector, find
from mmlm.corpus.sniff import AUDIO_ENDINGS, IMAGE_ENDINGS, sniff
from mmlm.errors import DataError

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
QUESTION = {"question", "prompt", "instruction", "query", "input", "q", "问题", "提问", "指令", "输入"}
ANSWER = {
    "answer", "output", "response", "completion", "reply", "target_text", "translation",
    "caption", "transcript", "summary", "a", "答案", "回答", "回复", "输出", "译文", "摘要",
}  # fmt: skip
_TEXT = QUESTION | {
    "text", "caption", "title", "description", "sentence", "review", "comment", "body", "content", "message", "en", "zh",
    "utterance", "tweet", "sms", "headline", "abstract", "passage", "document", "paragraph", "post", "news", "email",
    "review_text", "text_a", "文本", "内容", "正文", "评论", "评价", "标题", "句子", "描述", "新闻", "留言",
}  # fmt: skip
LABEL = (
    "label", "class", "category", "target", "diagnosis", "outcome", "sentiment", "species", "genre", "emotion",
    "intent", "topic", "result", "y", "标签", "类别", "分类", "情感", "意图", "诊断", "type", "kind", "tag",
)  # fmt: skip


class Columns:
    """The columns of a table (nested ones by their selectors) and what each of them is.

    `free` are those without a role yet; `odd` those that are never used: row numbers, and names that are no selectors.
    """

    def __init__(self, data: Path, groups: list[tuple[str, str]], rows: list[dict[str, Any]], total: int) -> None:
        self.data, self.groups, self.rows, self.total = data, groups, rows, total
        self.values = {c: [v for r in rows for v in find(r, c)[:1]] for c in _flat(rows)}
        self.values = {c: [v for v in vs if v != ""] for c, vs in self.values.items()}
        self.values = {c: vs for c, vs in self.values.items() if vs}
        self.free = [c for c in self.values if _can_be_written(c) and not self.numbers_rows(c)]
        self.odd = [c for c in self.values if c not in self.free]
        self.root = ""

    def take(self, column: str | None) -> str | None:
        if column:
            self.free.remove(column)
        return column

    def named(self, names: set[str] | tuple[str, ...]) -> list[str]:
        """Free columns whose name (its last part) is one of `names`, in the order of a tuple."""
        found = [c for c in self.single() if last_of(c) in names]
        return sorted(found, key=lambda c: names.index(last_of(c))) if isinstance(names, tuple) else found

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
        for column in [*self.named(_ID), *(c for c in self.single() if re.search(r"_id$|[a-z]I[dD]$", c))]:
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

    def numbers_rows(self, column: str) -> bool:
        """Whether a column without a name of its own counts the rows, such as the index that pandas writes."""
        return bool(re.fullmatch(r"column_\d+|unnamed: ?\d+", column.strip().lower())) and (
            self.is_number(column) and len(self.distinct(column)) == len(self.values[column])
        )

    def label(self, likely: str = "") -> str | None:
        """The column of classes to be answered: `likely` if it is one, else by its name, else the last that may be."""
        for column in [*[c for c in self.single() if c == likely], *self.named(LABEL)]:
            if self.is_class(column):
                return self.take(column)
            if self.is_number(column) and len(self.distinct(column)) > 2:
                raise DataError(
                    f"`{column}` holds {len(self.distinct(column))} different numbers", wanted="classes",
                    cure="predicting a number comes in a later version; make classes of it (such as low, middle, high)",
                )  # fmt: skip
        strings = [c for c in self.single() if self.is_class(c) and not self.is_number(c) and self.size(c) <= 60]
        strings = [c for c in strings if last_of(c) not in _TEXT] or strings
        whole = [c for c in self.single() if self.is_class(c) and self.is_number(c) and len(self.distinct(c)) <= 20]
        return self.take((strings or whole)[-1]) if strings or whole else None

    def size(self, column: str) -> float:
        """Mean length of a column's texts in UTF-8 bytes: a Chinese word is short in characters."""
        texts = self.texts(column) or [""]
        return sum(len(t.encode("utf-8", "replace")) for t in texts) / len(texts)

    def text(self) -> str | None:
        """The column of texts: one whose name says so however short it is, else that of the longest."""
        most = max((len(self.values[c]) for c in self.free), default=0)
        words = [c for c in self.single() if not self.is_number(c) and len(self.distinct(c)) > 2]
        words = [c for c in words if 2 * len(self.values[c]) >= most]
        named = [c for c in words if last_of(c) in _TEXT]
        long = [c for c in words if self.size(c) >= 12]
        for found in (set(named) & set(long), {c for c in named if not self.is_class(c)}, long, named):
            if found:
                return self.take(max(sorted(found), key=self.size))
        return None

    def any_text(self) -> str | None:
        """The longest column of words, where nothing else could be read."""
        words = [c for c in self.single() if not self.is_number(c) and len(self.distinct(c)) > 1]
        return self.take(max(words, key=self.size)) if words else None

    def fields(self, label: str | None) -> tuple[dict[str, str], list[str]]:
        """(name → column of the numbers and categories, names of those left out since they give the label away)."""
        found = {name_of(c): c for c in self.single() if self.is_number(c) or self.is_class(c)}
        given_away = [n for n, c in found.items() if label and self.tells(c, label)]
        return {n: c for n, c in found.items() if n not in given_away}, given_away

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


def _can_be_written(column: str) -> bool:
    """Whether a column's name can stand in scan.yaml as a selector."""
    try:
        column.encode()
        check_selector(column)
    except ValueError:  # also a name that is not UTF-8
        return False
    return "{" not in column and "}" not in column and column.isprintable()


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


def last_of(column: str) -> str:
    return re.split(r"[.\[\]]+", column.strip().lower())[-1].replace(" ", "_").replace("-", "_")


def name_of(column: str) -> str:
    """A task's or field's name after a column: words joined by underscores."""
    return re.sub(r"[^\w]+", "_", column).strip("_").lower() or "value"
