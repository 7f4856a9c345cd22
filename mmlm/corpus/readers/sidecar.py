"""Files of one name side by side → drafts: `x.png` + `x.txt` (+ `x.ogg`) (+ `x.json`)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mmlm.corpus.config import SidecarSource
from mmlm.corpus.drafts import (
    SPLIT_NAMES,
    Draft,
    Outcomes,
    Refusal,
    RefuseError,
    as_field,
    as_label,
    as_labels,
    as_number,
    as_split,
    as_text,
    decode_text,
    pick_wording,
    storable,
)
from mmlm.corpus.readers.folders import MAX_TEXT, Tree, kind_of, split_level
from mmlm.corpus.readers.rows import parse_json
from mmlm.corpus.records import Part, Record, Target
from mmlm.storage import sha256_bytes

MAX_JSON = 16 << 20
"""Bytes of the longest JSON file that is read."""


def read_sidecar(source: SidecarSource, tree: Tree) -> Outcomes:
    """Drafts of everything in `tree`; `group` is left empty, which means the hash of the content."""
    with_splits = split_level(tree.files(), depth=1)
    ignored = tuple("." + e.lower().lstrip(".") for e in source.ignore)
    links: list[Refusal] = []
    for relative, names in tree.folders(links):
        top = relative.split("/")[0].lower()
        split = SPLIT_NAMES[top] if with_splits and relative else source.split
        stems: dict[str, list[str]] = {}
        for name in names:
            inside = f"{relative}/{name}" if relative else name
            shown = tree.prefix + inside
            if not storable(shown):
                yield Refusal(ascii(shown), "", "bad_name", "the file's name is not UTF-8")
            elif not (ignored and name.lower().endswith(ignored)):
                stems.setdefault(os.path.splitext(name)[0], []).append(inside)
        for stem in sorted(stems):
            yield from _read(source, tree, stems[stem], split)
    yield from links


def _read(source: SidecarSource, tree: Tree, members: list[str], split: str) -> Outcomes:
    """The draft of files with one stem; a file that is none of ours is refused alone."""
    where = tree.prefix + members[0]
    name = os.path.splitext(where)[0]
    kinds: dict[str, list[str]] = {}
    for relative in members:
        if relative.lower().endswith(".json"):
            kind: str | Refusal = "json"
        else:
            kind = kind_of(tree, relative)
        if isinstance(kind, Refusal):
            yield kind
        else:
            kinds.setdefault(kind, []).append(relative)
    if not kinds:
        return
    try:
        media = any(kind in kinds for kind in ("image", "audio", "video"))
        if sum(map(len, kinds.values())) < 2 and not source.alone:
            raise RefuseError("no_partner", "no file of the same name lies beside it")
        for kind, found in kinds.items():
            if len(found) > 1 and kind != "image":
                raise RefuseError("duplicate_member", f"{len(found)} files of kind {kind} with one name")
        said = _json(kinds["json"][0], tree.open(kinds["json"][0])) if "json" in kinds else {}
        text = _text(kinds["text"][0], tree.open(kinds["text"][0])) if "text" in kinds else None
        parts = [Part(k, uri=tree.prefix + file) for k in ("image", "audio", "video") for file in kinds.get(k, [])]
        yield Draft(_record(source, name, parts, text, said, split, media), where)
    except RefuseError as error:
        yield Refusal(where, name, error.reason, error.detail)
    except OSError as error:
        yield Refusal(where, name, "unreadable_file", error.strerror or str(error))


def _record(
    source: SidecarSource, name: str, parts: list[Part], text: str | None, said: dict[str, Any], split: str, media: bool
) -> Record:
    lang = as_text(said.get("lang")) or source.lang
    written = text if text and source.text == "answer" else as_text(said.get("answer"))
    number = int(sha256_bytes(name.encode())[:8], 16)
    wording, asked_in = pick_wording(source.question, lang, number, written)
    fields = said.get("fields")
    if fields is not None:
        if not isinstance(fields, dict):
            raise RefuseError("bad_row", "`fields` is no mapping of names to values")
        parts.append(Part("fields", fields={str(k): as_field(v) for k, v in fields.items()}))
    contexts = [text if source.text == "context" else None, as_text(said.get("context"))]
    parts += [Part("text", "context", t) for t in contexts if t]
    own = as_text(said.get("question"))
    questions = [text if source.text == "question" else None, own]
    told = media or fields is not None or any(contexts) or any(questions)
    questions.append(wording if not any(questions) else None)
    parts += [Part("text", text=t) for t in questions if t]
    answer = next((t for k in ("answer", "caption") if (t := as_text(said.get(k)))), None)
    target = Target(
        as_label(said.get("label")),
        as_labels(said["labels"]) if said.get("labels") is not None else None,
        as_number(said.get("number")),
        text if source.text == "answer" and text else answer,
    )
    if target == Target():
        raise RefuseError("no_target", "neither a caption nor a label, labels, number or answer beside it")
    if not told:
        raise RefuseError("no_parts", "neither picture, sound, video, fields nor a question of its own")
    return Record(
        name, tuple(parts), as_text(said.get("task")) or source.task, target,
        as_split(said.get("split")) or split, as_text(said.get("group")) or "", asked_in if not any(questions[:2]) else lang,
        source.path, as_text(said.get("license")) or source.license,
    )  # fmt: skip


def _json(shown: str, path: Path) -> dict[str, Any]:
    if path.stat().st_size > MAX_JSON:
        raise RefuseError("too_large", f"{shown}: more than {MAX_JSON:,} bytes of JSON")
    try:
        said = parse_json(path.read_bytes())
    except ValueError as error:
        raise RefuseError("bad_json", f"{shown}: {error}") from None
    if not isinstance(said, dict):
        raise RefuseError("bad_row", f"{shown}: a {type(said).__name__} where an object is wanted")
    return said


def _text(shown: str, path: Path) -> str:
    if path.stat().st_size > MAX_TEXT:
        raise RefuseError("too_large", f"{shown}: a text of more than {MAX_TEXT:,} bytes")
    text = decode_text(path.read_bytes()).strip()
    if not text:
        raise RefuseError("no_target", f"{shown}: an empty text")
    return text
