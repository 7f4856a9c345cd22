"""Chat messages → drafts: OpenAI-like `messages`, ShareGPT-like `conversations`, media in parts or in lists."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
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
    "chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "function_call": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "context": "context",
}  # fmt: skip
_PLACEHOLDER = re.compile(r"\s?<(image|audio|video)>\s?")
_LISTS = {"image": ("images", "image"), "audio": ("audios", "audio"), "video": ("videos", "video")}


def read_chat(
    source: ChatSource, files: Iterable[tuple[str, Path]], data: str, repeats: dict[int, int] | None = None
) -> Outcomes:
    """Drafts of every line of `files` ((name shown, path)).

    `repeats`: how often each line without an id was seen, to be shared among sources.
    The last assistant turn is the target; what is said after it is cut unless the line has another target. Every message is
    a turn; those before the last question have negative numbers. Calls of tools are text of their turn, and the tools
    themselves of a system turn before all: a line of JSON for each.
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
                record, cut = _record(source, line, name, shown, data, repeats)
                yield Draft(record, where, cut=cut)
            except RefuseError as error:
                yield Refusal(where, name, error.reason, error.detail)
            except RecursionError:
                yield Refusal(where, name, "bad_json", "nested too deeply")
            except UnicodeEncodeError:
                yield Refusal(where, name, "bad_encoding", "a text with half a surrogate pair in it")


def _record(
    source: ChatSource, line: dict[str, Any], given: str, shown: str, data: str, repeats: dict[int, int]
) -> tuple[Record, bool]:
    """(the record, whether turns after its answer were cut). `given` is the line's own id, or ""."""
    name, group = _named(source, line, given, repeats)
    turns = list(_turns(line))
    label, number = as_label(line.get("label")), as_number(line.get("number"))
    labels = as_labels(line["labels"]) if line.get("labels") is not None else None
    whole = len(turns)
    if (label, labels, number) == (None, None, None) and any(role == "assistant" for role, _ in turns):
        while turns[-1][0] != "assistant":  # nobody answers it
            turns.pop()
    cut = len(turns) < whole
    answer = _answer(turns.pop()[1]) if turns and turns[-1][0] == "assistant" else None
    target = Target(label, labels, number, answer)
    if target == Target():
        raise RefuseError("no_target", "no message is the assistant's, and there is no label, labels or number")
    media = _Media(media_root(source.root, shown), data, line, [content for _, content in turns])
    parts = media.parts(turns)
    if not parts:
        raise RefuseError("no_parts", "nothing before the answer")
    record = Record(
        name, tuple(parts), as_text(line.get("task")) or source.task, target,
        as_split(line.get("split")) or source.split, group,
        as_text(line.get("lang")) or source.lang, as_text(line.get("source")) or shown,
        as_text(line.get("license")) or source.license,
    )  # fmt: skip
    return record, cut


def asked(line: dict[str, Any], make: Callable[[str, Any], Part]) -> list[Part]:
    """The parts of a line that is to be answered, not learnt from: what its last message asks, and all before. An answer at its
    end is left out. `make` gives the part of a medium from what stands for it. Raises RefuseError."""
    turns = list(_turns(line))
    if turns[-1][0] == "assistant":
        turns.pop()
    return _Media("", "", line, [content for _, content in turns], make=make).parts(turns) if turns else []


def _named(source: ChatSource, line: dict[str, Any], given: str, repeats: dict[int, int]) -> tuple[str, str]:
    """(id, group) of a line: what it gives, else its hash, with a number after it where the same line was there before."""
    group = as_text(line.get("group")) or given
    if given and source.id == "given":
        return given, group
    name = sha256_json(line)[:20]
    seen = repeats.get(int(name, 16), 0)
    repeats[int(name, 16)] = seen + 1
    return name + (f"-{seen + 1}" if seen else ""), group or name


def _turns(line: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """(role, content) of every message."""
    messages = line.get("messages", line.get("conversations"))
    if not isinstance(messages, list) or not messages:
        raise RefuseError("no_messages", "neither `messages` nor `conversations` with something in it")
    if tools := _parsed(line.get("tools")):
        written = [t if isinstance(t, str) else _json(t) for t in (tools if isinstance(tools, list) else [tools])]
        yield "system", [{"type": "text", "text": "\n".join(written)}]
    for message in messages:
        if not isinstance(message, dict):
            raise RefuseError("bad_row", f"a message is a {type(message).__name__}")
        said = message.get("role", message.get("from"))
        if str(said).lower() not in ROLES:
            raise RefuseError("bad_role", f"role {str(said)[:40]!r}; wanted user, assistant or system")
        yield ROLES[str(said).lower()], _with_calls(message, message.get("content", message.get("value")))


def _with_calls(message: dict[str, Any], content: Any) -> Any:
    """The content of a message, with its calls of tools as text behind it."""
    calls = message.get("tool_calls") or message.get("function_call") or []
    said = []
    for call in calls if isinstance(calls, list) else [calls]:
        called = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(called, dict) or not isinstance(called.get("name"), str):
            raise RefuseError("bad_row", "a call of a tool without a name")
        given = _parsed(called.get("arguments", {}))
        said.append({"type": "text", "text": _json({"name": called["name"], "arguments": given})})
    return [*(content if isinstance(content, list) else [content]), *said] if said else content


def _parsed(value: Any) -> Any:
    """What a text of JSON says; everything else, also a text that is none, as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


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
    make: Callable[[str, Any], Part] | None = None
    """What makes a part of a medium; absent: the URI or the bytes in the corpus."""

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
        return self.make(kind, value) if self.make else media_part(kind, value, self.root, self.data)

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
