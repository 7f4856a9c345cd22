"""Chat messages → drafts: OpenAI-like `messages`, ShareGPT-like `conversations`, media in parts or in lists."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mmlm.corpus.config import ChatSource
from mmlm.corpus.drafts import (
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
    media_part,
    media_root,
)
from mmlm.corpus.readers.rows import read_rows
from mmlm.corpus.records import Part, Record, Target
from mmlm.storage import sha256_json

ROLES = {
    "user": "user", "human": "user", "system": "system", "developer": "system",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "model": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "context": "context",
}  # fmt: skip
_PLACEHOLDER = re.compile(r"\s?<(image|audio|video)>\s?")
_LISTS = {"image": ("images", "image"), "audio": ("audios", "audio"), "video": ("videos", "video")}


def read_chat(
    source: ChatSource, files: Iterable[tuple[str, Path]], data: str, repeats: dict[int, int] | None = None
) -> Outcomes:
    """Drafts of every line of `files` ((name shown, path)).

    `repeats`: how often each line without an id was seen, to be shared among sources.
    The last assistant turn is the target. Every message is a turn; those before the last question have negative numbers.
    """
    repeats = {} if repeats is None else repeats
    for shown, path in files:
        for row in read_rows(path, shown):
            if isinstance(row, Refusal):
                yield row
                continue
            where, line = row
            name = ""
            try:
                if not isinstance(line, dict):
                    raise RefuseError("bad_row", f"a {type(line).__name__} where an object is wanted")
                name = as_text(line.get("id")) or ""
                yield Draft(_record(source, line, name, shown, data, repeats), where)
            except RefuseError as error:
                yield Refusal(where, name, error.reason, error.detail)
            except RecursionError:
                yield Refusal(where, name, "bad_json", "nested too deeply")
            except UnicodeEncodeError:
                yield Refusal(where, name, "bad_encoding", "a text with half a surrogate pair in it")


def _record(
    source: ChatSource, line: dict[str, Any], name: str, shown: str, data: str, repeats: dict[int, int]
) -> Record:
    group = as_text(line.get("group")) or ""
    if not name:
        name = sha256_json(line)[:20]
        group = group or name
        seen = repeats.get(int(name, 16), 0)
        repeats[int(name, 16)] = seen + 1
        name += f"-{seen + 1}" if seen else ""
    turns = list(_turns(line))
    answer = None
    if turns and turns[-1][0] == "assistant":
        answer = _answer(turns.pop()[1])
    media = _Media(media_root(source.root, shown), data, line, [content for _, content in turns])
    parts = media.parts(turns)
    target = Target(
        as_label(line.get("label")),
        as_labels(line["labels"]) if line.get("labels") is not None else None,
        as_number(line.get("number")),
        answer,
    )
    if target == Target():
        raise RefuseError(
            "no_target", "the last message is not the assistant's, and there is no label, labels or number"
        )
    if not parts:
        raise RefuseError("no_parts", "nothing before the answer")
    return Record(
        name, tuple(parts), as_text(line.get("task")) or source.task, target,
        as_split(line.get("split")) or source.split, group or name,
        as_text(line.get("lang")) or source.lang, as_text(line.get("source")) or shown,
        as_text(line.get("license")) or source.license,
    )  # fmt: skip


def _turns(line: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """(role, content) of every message."""
    messages = line.get("messages", line.get("conversations"))
    if not isinstance(messages, list) or not messages:
        raise RefuseError("no_messages", "neither `messages` nor `conversations` with something in it")
    for message in messages:
        if not isinstance(message, dict):
            raise RefuseError("bad_row", f"a message is a {type(message).__name__}")
        said = message.get("role", message.get("from"))
        if str(said).lower() not in ROLES:
            raise RefuseError("bad_role", f"role {str(said)[:40]!r}; wanted user, assistant or system")
        yield ROLES[str(said).lower()], message.get("content", message.get("value"))


def _answer(content: Any) -> str:
    pieces = content if isinstance(content, list) else [content]
    texts = [p if isinstance(p, str) else p.get("text") if isinstance(p, dict) else None for p in pieces]
    if any(isinstance(p, dict) and p.get("type") not in (None, "text", "output_text") for p in pieces):
        raise RefuseError("unsupported_kind", "an answer that is not text")
    text = "\n".join(t for t in texts if isinstance(t, str))
    if not text.strip():
        raise RefuseError("no_target", "the assistant's last message is empty")
    return text


@dataclass
class _Media:
    """Turns contents into parts; hands out the items of the record's media lists where placeholders stand."""

    root: str
    data: str
    line: dict[str, Any]
    contents: list[Any]
    lists: dict[str, list[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for kind, names in _LISTS.items():
            value = next((self.line[n] for n in names if self.line.get(n) is not None), None)
            if value is not None:
                self.lists[kind] = list(value) if isinstance(value, list) else [value]

    def parts(self, turns: list[tuple[str, Any]]) -> list[Part]:
        found: list[Part] = []
        asked = [at for at, (role, _) in enumerate(turns) if role == "user"]
        last = asked[-1] if asked else len(turns) - 1
        if not self.placeholders():  # they belong to the first question
            first = min(0, (asked[0] if asked else 0) - last)
            items = [self.part(kind, item) for kind, items in self.lists.items() for item in items]
            found += [replace(part, turn=first) for part in items]
            self.lists = {}
        for at, (role, content) in enumerate(turns):
            # what a tool or a system says after the last question belongs to its turn
            found += [_in_turn(part, role, min(0, at - last)) for part in self.content(role, content)]
        if left := {kind: items for kind, items in self.lists.items() if items}:
            raise RefuseError(
                "media_mismatch", f"{sum(map(len, left.values()))} more {'/'.join(left)} than places for them"
            )
        return found

    def placeholders(self) -> bool:
        """Whether some content says where the listed media stand."""
        for content in self.contents:
            for piece in content if isinstance(content, list) else [content]:
                if isinstance(piece, str) and any(m[1] in self.lists for m in _PLACEHOLDER.finditer(piece)):
                    return True
                kind = piece.get("type") if isinstance(piece, dict) else None
                if isinstance(kind, str) and kind in self.lists and not _value(piece, kind):
                    return True
        return False

    def content(self, role: str, content: Any) -> Iterator[Part]:
        for piece in content if isinstance(content, list) else [content]:
            if piece is None:
                continue
            if isinstance(piece, str):
                yield from self.text(role, piece)
            elif isinstance(piece, dict):
                yield from self.piece(role, piece)
            else:
                raise RefuseError("bad_row", f"a content part is a {type(piece).__name__}")

    def text(self, role: str, text: str) -> Iterator[Part]:
        at = 0
        for match in _PLACEHOLDER.finditer(text):
            if match[1] in self.lists:
                yield from _text_part(role, text[at : match.start()])
                yield self.take(match[1])
                at = match.end()
        yield from _text_part(role, text[at:])

    def piece(self, role: str, piece: dict[str, Any]) -> Iterator[Part]:
        kind = str(piece.get("type", "text"))
        if kind in ("text", "input_text", "output_text", "context"):
            if not isinstance(piece.get("text"), str):
                raise RefuseError("bad_row", "a text part without `text`")
            yield from _text_part(
                "context" if kind == "context" or piece.get("role") == "context" else role, piece["text"]
            )
        elif kind == "fields":
            if not isinstance(piece.get("fields"), dict):
                raise RefuseError("bad_row", "a fields part without `fields`")
            yield Part("fields", fields={str(k): as_field(v) for k, v in piece["fields"].items()})
        else:
            modality = kind.removeprefix("input_").removesuffix("_url")
            if modality not in _LISTS:
                raise RefuseError("unsupported_kind", f"a part of type {kind[:40]!r}")
            value = _value(piece, kind)
            yield self.take(modality) if value is None else self.part(modality, value)

    def part(self, kind: str, value: Any) -> Part:
        return media_part(kind, value, self.root, self.data)

    def take(self, kind: str) -> Part:
        if not self.lists.get(kind):
            raise RefuseError("media_mismatch", f"a place for {kind} without one in `{_LISTS[kind][0]}`")
        return self.part(kind, self.lists[kind].pop(0))


def _in_turn(part: Part, role: str, turn: int) -> Part:
    return replace(part, turn=turn, role=part.role if part.kind == "text" else "user" if role == "context" else role)


def _value(piece: dict[str, Any], kind: str) -> Any:
    """What a media part holds: under the name of its type, or `url`, `path`, `data`."""
    names = (kind, kind.removeprefix("input_"), kind.removesuffix("_url"), "url", "path", "file")
    found = next((piece[n] for n in names if piece.get(n)), None)
    return {"data": piece["data"]} if found is None and piece.get("data") else found


def _text_part(role: str, text: str) -> Iterator[Part]:
    if text.strip():
        yield Part("text", role, text.strip())
