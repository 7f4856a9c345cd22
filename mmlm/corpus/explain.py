"""`mmlm scan --explain`: what a scan would make of the corpora, without making it. Nothing is written.

Of every source: its files; its columns with the role that each of them has, an example, how many rows have one and how
many different ones a sample holds; what is not used; some records as they would become; and what would be refused.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import chain, islice
from pathlib import Path
from typing import Any, cast

from mmlm import remote
from mmlm.config import blank_credentials, parse
from mmlm.corpus import keypad
from mmlm.corpus.columns import ROWS, drawn_rows, flat_columns
from mmlm.corpus.config import (
    ChatSource,
    DocumentsSource,
    FolderSource,
    HfSource,
    KeypadSource,
    ScanConfig,
    SidecarSource,
    Source,
    SplitConfig,
    TableMap,
    TableSource,
    WebDatasetSource,
)
from mmlm.corpus.drafts import SPLIT_NAMES, Draft, Refusal
from mmlm.corpus.guess import look
from mmlm.corpus.media import Looked, MediaReader
from mmlm.corpus.readers import hf, webdataset
from mmlm.corpus.readers.rows import read_rows
from mmlm.corpus.readers.sources import data_set, files_of, opened, read_source
from mmlm.corpus.records import Part, Record
from mmlm.corpus.select import find
from mmlm.corpus.sniff import AUDIO_ENDINGS, IMAGE_ENDINGS, TEXT_ENDINGS, VIDEO_ENDINGS, Header
from mmlm.corpus.splits import Splitter, position
from mmlm.errors import DataError
from mmlm.progress import Progress
from mmlm.storage import is_remote, resolve
from mmlm.world import cores

Files = list[tuple[str, Path]]
DataSet = tuple[Path, hf.Need]
RECORDS = 3
"""Records that are shown of each source."""
TRIED = 200
"""Records of each source that are read as the scan would read them, media included."""
WHOLE = 256 << 20
"""Bytes of tables up to which the sample is drawn from all rows; of larger ones the first rows are taken."""
KEYPAD_DIGITS = 24
"""Digits of the built-in corpus that are made, in a temporary folder, to be shown."""
_CELL = 60
"""Characters of a value that are shown."""
_CHAT_ROLES = {
    "messages": "turns", "conversations": "turns", "images": "pictures", "image": "pictures", "audios": "sounds",
    "audio": "sounds", "videos": "videos", "video": "videos", "id": "id", "group": "group", "split": "split",
    "lang": "lang", "task": "task", "label": "label", "labels": "labels", "number": "number", "source": "source",
    "license": "license", "tools": "tools",
}  # fmt: skip
"""What a chat line's keys mean; their names are fixed."""


def explain(config: ScanConfig, data: Path | str) -> dict[str, Any]:
    """What `scan` would make of the sources below `data`, a folder or an address: JSON values; `explain_words` says them to
    people.

    Of what lies elsewhere only the tables and tars that the sample is drawn from, and the media in it, are fetched.

    Raises DataError when a source is not there.
    """
    with ExitStack() as held:
        found = [_source(n, s, config, data, held) for n, s in enumerate(config.sources)]
    steps = [*config.curate.record_steps, *config.curate.set_steps]
    settings = {"on_bad_part": config.on_bad_part, "error_budget": config.error_budget, "curate": steps}
    facts: dict[str, Any] = _encodable({"data": blank_credentials(str(data)), "sources": found, **settings})
    return facts


def explain_files(path: Path | str) -> dict[str, Any]:
    """The same for somebody's files without a story: what `mmlm new` would infer. Raises DataError as `look` does."""
    guess = look(path)
    config = parse(ScanConfig, guess.scan, "what was inferred")
    inferred: dict[str, Any] = _encodable({"form": guess.form, "tasks": guess.tasks, "says": guess.says})
    return {"inferred": inferred, "scan": guess.scan, **explain(config, guess.data)}


def _encodable(value: Any) -> Any:
    """JSON values without what UTF-8 cannot hold, such as bytes of other encodings in the names of files."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {_encodable(k): _encodable(v) for k, v in value.items()}
    return [_encodable(v) for v in value] if isinstance(value, list | tuple) else value


def _source(number: int, source: Source, config: ScanConfig, data: Path | str, held: ExitStack) -> dict[str, Any]:
    facts: dict[str, Any] = {"key": f"sources[{number}]", "kind": source.kind}
    if isinstance(source, KeypadSource):
        data, facts["note"] = _small_keypad(source, config.split, data, held)
        files = [(f"{keypad.FOLDER}/{keypad.TABLE}", Path(data, keypad.FOLDER, keypad.TABLE))]
    else:
        files = files_of(source, data)
    facts["files"] = {
        "count": len(files),
        "bytes": sum(_size(f, data) for f in files),
        "first": [n for n, _ in files[:3]],
    }
    place = held.enter_context(data_set(source, data)) if isinstance(source, HfSource) else None
    facts |= _columns(source, files, data, place)
    tried, problem = _tried(source, config, data)
    records = [o for o in tried if isinstance(o, Looked)]
    refused = [o for o in tried if isinstance(o, Refusal)]
    given = any(r.record.split for r in records)
    facts["records"] = [_record(one, config.split, given) for one in _chosen(records)]
    facts["tried"] = len(tried)
    facts["refused"] = {
        "count": len(refused),
        "reasons": dict(sorted(Counter(r.reason for r in refused).items())),
        "examples": [
            {"source": r.source, "id": r.id, "reason": r.reason, "detail": r.detail[:200]}
            for r in _first_of_each(refused)
        ],
    }
    if dropped := Counter(p.reason for r in records for p in r.dropped):
        facts["dropped_parts"] = dict(sorted(dropped.items()))
    if problem:
        facts["stops"] = problem
    return facts


def _small_keypad(source: KeypadSource, split: SplitConfig, data: Path | str, held: ExitStack) -> tuple[Path, str]:
    """(a temporary folder with some of the built-in corpus, what to say)."""
    folder = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="mmlm-explain-")))
    few = source.model_copy(
        update={"images": min(source.images, KEYPAD_DIGITS), "renderings": 1, "renderings_held_out": 1}
    )
    quiet, Progress.quiet = Progress.quiet, True
    try:
        keypad.write_keypad(few, split, folder)
    finally:
        Progress.quiet = quiet
    return folder, f"made on the spot into {data}; shown are {few.images} of its {source.images:,} digits, each once"


def _size(file: tuple[str, Path], data: Path | str) -> int:
    name, path = file
    where = resolve(name, data) if isinstance(data, str) else name
    try:
        return max(0, remote.known(where).size) if is_remote(where) else os.stat(path).st_size
    except (OSError, DataError):
        return 0


def _columns(source: Source, files: Files, data: Path | str, place: DataSet | None) -> dict[str, Any]:
    """`columns` (with their roles), `unused`, and of what they were read: `rows`, the number of rows in the sample."""
    if isinstance(source, FolderSource | SidecarSource | DocumentsSource):
        return {"rows": len(files), "columns": _file_columns(source, [n for n, _ in files]), "unused": []}
    rows = _rows(source, files, data, place)
    every = flat_columns(rows)
    if isinstance(source, ChatSource | KeypadSource):
        top = list(dict.fromkeys(str(k) for row in rows for k in row))
        taken = [_column(rows, c, [_CHAT_ROLES[c]], "by its name") for c in top if c in _CHAT_ROLES]
        return {"rows": len(rows), "columns": taken, "unused": [_column(rows, c) for c in top if c not in _CHAT_ROLES]}
    taken = []
    roles = _roles(_as_table(source, rows, place))
    for selector, keys in roles.items():
        how = "scan.yaml" if any(_said(source, key) for key in keys) else "inferred"
        taken.append(_column(rows, selector, keys, how))
    covered = {_plain(s) for s in roles}
    free = [c for c in every if not c.startswith("__") and not any(_covers(s, _plain(c)) for s in covered)]
    return {"rows": len(rows), "columns": taken, "unused": [_column(rows, c) for c in free]}


def _rows(source: Source, files: Files, data: Path | str, place: DataSet | None) -> list[dict[str, Any]]:
    """A sample of the rows of a source, in order."""
    rows: Iterable[Any]
    if isinstance(source, WebDatasetSource):
        rows = (row for name, path in opened(files, data) for _, row, _ in webdataset.samples_of(source, name, path))
    elif place:
        folder, need = place
        found = hf.hf_files(cast(HfSource, source), folder)
        features = hf.features_of(folder, found, need)
        rows = (hf.converted(row, features) for _, name in found for row in hf.rows_of(need(folder / name), name))
    else:
        rows = chain.from_iterable(read_rows(path, name) for name, path in opened(files, data))
    if sum(_size(file, data) for file in files) > WHOLE:
        rows = islice(rows, ROWS)
    drawn = drawn_rows(rows)[0]
    if not isinstance(source, WebDatasetSource):
        return drawn
    # members that are media are known by their kind: all pictures of a sample are `_images`
    return [{k: v for k, v in row.items() if not (isinstance(v, dict) and set(v) == {"uri"})} for row in drawn]


def _as_table(source: Any, rows: list[dict[str, Any]], place: DataSet | None) -> TableSource:
    """The source as a table, with everything that its reader would infer; without that where it could not."""
    try:
        if isinstance(source, WebDatasetSource):
            return webdataset.inferred(source, rows)
        if place:
            folder, need = place
            return hf.inferred(source, hf.features_of(folder, hf.hf_files(source, folder), need))
    except DataError:  # told by what is tried, below
        return TableSource.model_construct(kind="table", files=[], map=source.map, ask=source.ask)
    table: TableSource = source
    return table


def _said(source: Any, key: str) -> bool:
    """Whether scan.yaml itself says what `key` (such as `map.image`, `ask[0].label`) is."""
    part, _, rest = key.partition(".")
    return bool(source.ask) if part.startswith("ask") else bool(getattr(source.map, rest.split(".")[0], None))


def _roles(source: TableSource) -> dict[str, list[str]]:
    """selector → keys of scan.yaml that name it, in their order."""
    found: dict[str, list[str]] = {}

    def note(selector: Any, key: str) -> None:
        for one in selector if isinstance(selector, list) else [selector]:
            if one and "{" in one and "[" not in one.split("{")[0]:
                for hole in re.findall(r"\{([^{}]+)\}", one):
                    note(hole, key)
            elif one:
                found.setdefault(one, []).append(key)

    for name in TableMap.model_fields:
        value = getattr(source.map, name)
        if name == "fields" and isinstance(value, dict):
            for field, selector in value.items():
                note(selector, f"map.fields.{field}")
        elif name not in ("many", "categories"):
            note(value, f"map.{name}")
    for number, ask in enumerate(source.ask):
        for name in (
            "each",
            "text",
            "context",
            "label",
            "labels",
            "number",
            "answer",
            "lang",
            "image",
            "audio",
            "video",
        ):
            value = getattr(ask, name, None)
            if name == "lang" and value and "{" not in value:
                continue  # there it is the code itself
            note(value, f"ask[{number}].{name}")
        wordings = ask.question.values() if isinstance(ask.question, dict) else [ask.question]
        for hole in dict.fromkeys(h for w in wordings for h in re.findall(r"\{([^{}]+)\}", w)):
            note(hole, f"ask[{number}].question")
        if ask.each:  # what an entry brings is no column
            for name in ("key", "value", "name"):
                found.pop(name, None)
            for selector in [s for s in found if s.startswith("value.")]:
                found.pop(selector)
    return found


def _plain(selector: str) -> str:
    return re.sub(r"\[[^\[\]]*\]", "[]", selector)


def _covers(selector: str, column: str) -> bool:
    """Whether a selector takes in a column: it, or what it lies in."""
    return (
        column == selector or column.startswith((f"{selector}.", f"{selector}[")) or selector.startswith(f"{column}[")
    )


def _column(rows: list[dict[str, Any]], selector: str, keys: list[str] | None = None, how: str = "") -> dict[str, Any]:
    values = [v[0] for row in rows if (v := [x for x in find(row, selector) if x not in ("", [], {})])]
    facts: dict[str, Any] = {"column": selector, "example": on_one_line(values[0]) if values else ""}
    facts |= {"filled": round(len(values) / max(1, len(rows)), 4), "distinct": len({_key(v) for v in values})}
    if "{" in selector:  # filled in for every entry: of the row alone nothing can be said
        facts |= {"filled": None, "distinct": None}
    return {**facts, "keys": keys, "how": how} if keys else facts


def _key(value: Any) -> Any:
    """What is equal for equal values."""
    if isinstance(value, dict):
        return tuple((k, _key(v)) for k, v in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(_key, value))
    return hash(value) if isinstance(value, bytes) else str(value)


def on_one_line(value: Any, most: int = _CELL) -> str:
    """A value on one line, cut."""
    if isinstance(value, bytes):
        return f"{len(value):,} bytes"
    if isinstance(value, dict):
        text = "{" + ", ".join(f"{k}: {on_one_line(v, most)}" for k, v in islice(value.items(), 20)) + "}"
    elif isinstance(value, list | tuple):
        text = "[" + ", ".join(on_one_line(v, most) for v in value[:20]) + "]"
    else:
        text = str(value)
    text = "".join(c if c.isprintable() else " " for c in text[: 4 * most])
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"


def _file_columns(source: Any, names: list[str]) -> list[dict[str, Any]]:
    """What the names of files tell: endings, and the folders that are classes or splits."""
    from mmlm.corpus.readers.folders import split_level

    kinds = {"pictures": IMAGE_ENDINGS, "sounds": AUDIO_ENDINGS, "videos": VIDEO_ENDINGS, "text": TEXT_ENDINGS}
    if isinstance(source, DocumentsSource):
        kinds = {"document": (".txt", ".md", ".markdown", ".html", ".htm", ".warc", ".gz", ".pdf")}
    elif isinstance(source, SidecarSource):
        kinds |= {f"text: {source.text}": TEXT_ENDINGS, "target, fields and more": (".json",)}
        del kinds["text"]
    endings: dict[str, list[str]] = {}
    for name in names:
        endings.setdefault(os.path.splitext(name)[1].lower() or "no ending", []).append(name)
    found = []
    for ending, held in sorted(endings.items(), key=lambda item: (-len(item[1]), item[0])):
        role = next((k for k, known in kinds.items() if ending in known), "")
        facts = {"column": f"files {ending}", "example": held[0][-_CELL:], "filled": round(len(held) / len(names), 4)}
        found.append(
            {**facts, "distinct": len(held), "keys": [role or "looked into, else refused"], "how": "by its ending"}
        )
    if isinstance(source, DocumentsSource):
        return found
    below = "" if source.path in ("", ".") else source.path.strip("/").removeprefix("./") + "/"
    relative = [n.removeprefix(below) for n in names]
    with_splits = split_level(relative)
    folders = [n.split("/")[:-1] for n in relative]
    if with_splits:
        folders = [f for f in folders if f and f[0].lower() in SPLIT_NAMES]  # what lies beside them is left out
        found.insert(0, _folder_column("topmost folder", [f[0] for f in folders], "split", len(names)))
    if isinstance(source, FolderSource):
        inner = [f[with_splits:] for f in folders]
        classes = ["/".join(f) if source.nested else f[0] for f in inner if f]
        found.insert(0, _folder_column("class folder", classes, "label", len(names)))
    return found


def _folder_column(column: str, values: list[str], role: str, total: int) -> dict[str, Any]:
    return {
        "column": column, "example": values[0] if values else "", "filled": round(len(values) / max(1, total), 4),
        "distinct": len(set(values)), "keys": [role], "how": "by its place",
    }  # fmt: skip


def _tried(source: Source, config: ScanConfig, data: Path | str) -> tuple[list[Looked | Refusal], str]:
    """(the first TRIED outcomes with their media looked at, what stopped it or "")."""
    reader = MediaReader(
        data, drop=config.on_bad_part == "drop_part", allow_remote=config.allow_remote, threads=min(4, cores()),
        video=config.allow_video,
    )  # fmt: skip
    outcomes: list[Draft | Refusal] = []
    problem = ""
    try:
        outcomes.extend(islice(read_source(source, data), TRIED))
    except DataError as error:
        problem = str(error)
    found: list[Looked | Refusal] = []
    seen: set[str] = set()
    for one in reader.look(outcomes):
        if isinstance(one, Looked) and one.record.id in seen:
            one = Refusal(one.where, one.record.id, "duplicate_id", "another record has this id")
        elif isinstance(one, Looked):
            seen.add(one.record.id)
        found.append(one)
    return found, problem


def _chosen(records: list[Looked]) -> Iterator[Looked]:
    """The first record of every task, then others, RECORDS in all and in their order."""
    first: dict[str, int] = {}
    for at, one in enumerate(records):
        first.setdefault(one.record.task, at)
    wanted = [*first.values(), *(at for at in range(len(records)) if at not in first.values())][:RECORDS]
    return (records[at] for at in sorted(wanted))


def _first_of_each(refused: list[Refusal]) -> list[Refusal]:
    found: dict[str, Refusal] = {}
    for one in refused:
        found.setdefault(one.reason, one)
    return [*found.values()][:8]


def _record(one: Looked, split: SplitConfig, given: bool) -> dict[str, Any]:
    record = one.record
    headers = list(one.headers)
    parts = []
    for part in record.parts:
        header = headers.pop(0) if part.kind in ("image", "audio", "video") and headers else None
        parts.append(_part(part, header))
    target = record.target
    answers = {"label": target.label, "labels": target.labels, "number": target.number, "text": target.text}
    return {
        "id": record.id, "where": one.where, "task": record.task, "lang": record.lang, "group": record.group,
        **_split(record, split, given), "parts": parts,
        "target": {k: on_one_line(v, 200) for k, v in answers.items() if v is not None},
    }  # fmt: skip


def _part(part: Part, header: Header | None) -> dict[str, Any]:
    facts: dict[str, Any] = {"kind": part.kind, "role": part.role}
    if part.kind == "text":
        return facts | {"text": on_one_line(part.text, 200)}
    if part.kind == "fields":
        return facts | {"fields": part.fields}
    facts |= {"uri": part.uri} if part.uri is not None else {"bytes": len(part.data or b"")}
    if header:
        facts["format"] = header.format
        if header.width:
            facts["size"] = [header.width, header.height]
        if header.kind == "audio":
            facts |= {"seconds": round(header.seconds, 3), "rate": header.rate}
    return facts


def _split(record: Record, split: SplitConfig, given: bool) -> dict[str, str]:
    """Which split a record falls into and why, as far as one record tells it."""
    if record.split:
        return {"split": record.split, "split_by": "the data give it"}
    if given:
        return {"split": "", "split_by": "its group, if another record of it has a split; else a hash of the group"}
    by_hash = Splitter.by_hash(position(record.group, split.salt), {"val": split.val, "test": split.test})
    return {"split": by_hash, "split_by": f"a hash of its group ({split.val:.0%} val, {split.test:.0%} test)"}
