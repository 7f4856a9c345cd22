"""What the columns of a Hugging Face data set are for: which are asked, which are read, which stay unused."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import pydantic

from mmlm.corpus.column_names import ANSWER, GROUP, ID, LABEL, LANG, PAIRS, QUESTION, SPLIT, TEXT
from mmlm.corpus.config import CAPTION, Ask, HfSource, TableMap, TableSource
from mmlm.errors import DataError

TRANSCRIBE = {"en": "What is heard?", "zh": "听到了什么？"}
KINDS = {"Image": "image", "Audio": "audio", "Video": "video"}
_ABOUT_ROWS = ID | GROUP | LANG | SPLIT | {"guid", "license", "licence", "hash", "md5", "sha256", "timestamp", "date"}
_PLACES = {"file", "file_name", "filename", "file_path", "filepath", "path", "url", "uri", "link", "image_url"}
_FIRST = {first for first, _ in PAIRS} | {"transcription"} | TEXT
_SECOND = {second for first, second in PAIRS if first != "question"} | {"context", "passage", "input", "title", "标题"}
"""Names of texts that stand beside another one, which is then what is read first."""


@dataclass
class Features:
    """What the columns are: `media` column → kind; `classes` column → names; `many` those that hold lists of classes;
    `strings` in order; `others` that are nothing of the kind."""

    media: dict[str, str] = field(default_factory=dict)
    classes: dict[str, list[str]] = field(default_factory=dict)
    many: set[str] = field(default_factory=set)
    strings: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.media or self.classes or self.strings)


def inferred(source: HfSource, features: Features) -> TableSource:
    """The source as a table: what its map and questions leave open is read off `features`.

    Raises DataError when no column is an answer or a label, or a name is no selector.
    """
    columns = source.map.model_dump()
    for kind in KINDS.values():
        named = [c for c, k in features.media.items() if k == kind]
        if named and not columns[kind]:
            columns[kind] = named if len(named) == 1 else [f"_{kind}s"]
            columns["many"] = "all"
    try:
        return TableSource(
            kind="table", files=[source.path], root="" if source.path == "." else source.path, map=TableMap(**columns),
            ask=source.ask or _asks(source, features), lang=source.lang, license=source.license, split=source.split,
        )  # fmt: skip
    except pydantic.ValidationError as error:
        raise DataError(
            f"the columns of {source.path} have names that cannot be read as selectors ({error.errors()[0]['msg'][:120]})",
            cure="rename them, or say in `map` and `ask` which columns hold what",
        ) from None


def unused(features: Features) -> list[str]:
    """The columns that no question asks or shows where nothing but the features says so. Raises DataError as `inferred`."""
    asks = inferred(HfSource(kind="hf"), features).ask
    places = (place for ask in asks for place in (ask.text, ask.context, ask.label, ask.labels, ask.answer))
    used = {place.strip("{}") for place in places if place}
    return [c for c in (*features.strings, *features.classes, *features.others) if c not in used]


def _asks(source: HfSource, features: Features) -> list[Ask]:
    columns = source.map
    shown = bool(features.media or columns.image or columns.audio or columns.video or columns.fields)
    strings = _texts([s for s in features.strings if s not in (columns.id, columns.lang, columns.group)], shown)
    lower = {s.lower(): s for s in strings}
    question = next((lower[s] for s in sorted(lower, key=lambda s: s == "input") if s in QUESTION), None)
    answer = next((lower[s] for s in lower if s in ANSWER and lower[s] != question), None)
    if features.classes:
        text, beside = _read([s for s in strings if not _tells_class(s, features)])
        if not text and not shown:
            raise _unclear(source, features, "are names and labels alone, with nothing to learn from")
        return [
            Ask(
                task=name, text=text, context=beside, question={"en": f"Which {name} is this?", "zh": f"这是哪一个 {name}？"},
                **{"labels" if name in features.many else "label": name},
            )
            for name in features.classes
        ]  # fmt: skip
    if question and answer:
        beside = next((lower[s] for s in ("context", "passage", "input") if lower.get(s, question) != question), None)
        return [Ask(task="answer", text=question, context=_hole(beside), answer=answer)]
    label = next((lower[s] for s in LABEL if s in lower), None)
    if label and (features.media or len(strings) > 1):
        text, beside = _read([s for s in strings if s != label])
        wording = {"en": "Which class is this?", "zh": "这是哪一类？"}
        return [Ask(task=label, text=text, context=beside, question=wording, label=label)]
    if strings and features.media:
        heard = set(features.media.values()) == {"audio"}
        task, wording = ("transcript", TRANSCRIBE) if heard else ("caption", CAPTION)
        return [Ask(task=task, question=wording, answer=answer or _read(strings)[0])]
    raise _unclear(source, features, "do not say what is to be answered")


def _unclear(source: HfSource, features: Features, what: str) -> DataError:
    named = ", ".join([*features.media, *features.classes, *features.strings])[:200]
    return DataError(
        f"the columns of {source.path} ({named}) {what}",
        cure="say in `ask` which column holds the label or answer, such as {task: label, text: text, label: label}",
    )


def _texts(strings: list[str], shown: bool) -> list[str]:
    """Those of `strings` that are no names of rows. Where nothing else is `shown`, an address may be all there is."""
    texts = [s for s in strings if not _is_about_rows(s) and _plain(s) not in _PLACES]
    return texts or [s for s in strings if not shown and _plain(s) in _PLACES]


def _is_about_rows(name: str) -> bool:
    return _plain(name) in _ABOUT_ROWS or bool(re.search(r"_id$|[a-z]I[dD]$", name))


def _tells_class(name: str, features: Features) -> bool:
    """Whether a column bears the name of a label's words, such as `label_text` beside `label`."""
    return any(_plain(name).startswith(f"{_plain(label)}_") for label in features.classes)


def _read(strings: Iterable[str]) -> tuple[str | None, str | None]:
    """(the text to be read, a template of the one beside it) of `strings`, by their names."""
    ranks = {s: 1 if (name := _plain(s)) in _SECOND else 0 if name in _FIRST else 2 for s in strings}
    ranked = sorted(ranks, key=lambda s: ranks[s])
    beside = next((s for s in ranked[1:] if ranks[s] == 1), next((s for s in ranked[1:] if ranks[s] == 0), None))
    return (ranked[0] if ranked else None), _hole(beside)


def _hole(column: str | None) -> str | None:
    # a selector by itself would have to hold something in some row, and what stands beside a text may be empty
    return f"{{{column}}}" if column and not set(column) & set("{}") else None


def _plain(name: str) -> str:
    return name.strip().lower().replace(" ", "_").replace("-", "_")
