"""How the turns before an answer are laid out as tokens.

A template is filled with stand-ins, never with what people wrote: its own words are encoded with the tokenizer's marks
(such as `<|im_start|>`), the turns as plain text. So a text can neither pose as a turn nor change the template.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from mmlm.corpus.records import Part
from mmlm.errors import ConfigError
from mmlm.features.config import FeaturesConfig
from mmlm.features.failures import SampleError
from mmlm.features.spec import CONTEXT
from mmlm.features.text import Tokenizer

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""For people to read; `chatml` gives what this Jinja template gives, without Jinja."""
MAX_TEMPLATE = 1 << 17
"""Longest template, and longest text made of one, characters."""
FILES = ("chat_template.jinja", "tokenizer_config.json")
REMEMBERED = 4096
"""Sequences of roles for which the filled template is kept."""
Span = tuple[int, int]
_STAND_IN = re.compile("\ue000([0-9]+)\ue001")
"""Private-use characters around a number, in place of a turn's text."""


@dataclass(frozen=True, slots=True)
class Said:
    """A piece of a record at its place in the dialogue: a text, or the slots of a picture, a sound, fields."""

    role: str
    """`user`, `system`, `assistant`, `tool`; `context` is text beside the dialogue."""
    text: str = ""
    slots: tuple[int, ...] = ()
    turn: int = 0
    """0: the turn that is answered; earlier ones are negative."""

    @property
    def past(self) -> bool:
        return self.turn < 0 and self.role != "system"


@dataclass(slots=True)
class Prompt:
    """`ids`, and the half-open ranges of them that may be taken away; no slot lies in one."""

    ids: list[int] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)

    def add(self, ids: Iterable[int], spare: bool = False) -> None:
        start = len(self.ids)
        self.ids += ids
        if spare and start < len(self.ids):
            self.spans.append((start, len(self.ids)))


class Chat:
    """Lays out dialogues by one template: `plain`, `chatml` or the source of a Jinja template."""

    def __init__(self, template: str, tokenizer: Tokenizer) -> None:
        self.template, self.tokenizer = template, tokenizer
        self._known: dict[tuple[str, ...], list[_Segment]] = {}

    def in_order(self, parts: Iterable[Part]) -> list[Part]:
        """A record's parts in the order in which `lay_out` wants them: of one turn the system's first. Media come out in
        this order."""
        if self.template == "plain":
            return list(parts)
        return sorted(parts, key=lambda part: (part.turn, part.role != "system"))

    def lay_out(self, pieces: list[Said]) -> Prompt:
        """A record's pieces, given as `in_order` has them, up to where the answer begins. What may be taken away are contexts and
        what was said before the turn that is answered, media apart.

        `plain`: contexts, earlier turns (as contexts) and media in their order, then system and question below each
        other. Otherwise contexts come first, then the template with every turn in its place, media within their turns,
        and whatever the template puts before an answer. Raises SampleError `unsupported` when it refuses the turns.
        """
        prompt = Prompt()
        if self.template != "plain":
            for said in pieces:
                if said.role == "context":
                    prompt.add([CONTEXT, *self.tokenizer.encode(said.text)], spare=True)
            self._fill(_turns(pieces), prompt)
            return prompt
        for said in pieces:
            if said.slots:
                prompt.add(said.slots)
            elif said.role == "context" or said.past:
                prompt.add([CONTEXT, *self.tokenizer.encode(said.text)], spare=True)
        question = [s.text for s in pieces if not s.slots and s.role != "context" and not s.past]
        prompt.add(self.tokenizer.encode("\n".join(question)))
        return prompt

    def _fill(self, turns: list[list[Said]], prompt: Prompt) -> None:
        """Add the template filled with `turns`."""
        for segment in self._segments(tuple(turn[0].role for turn in turns)):
            whole = segment.turn is not None and turns[segment.turn][0].past  # the words around it go with it
            held: list[int] = []
            for piece in segment.pieces:
                if not isinstance(piece, int):
                    held += piece
                    continue
                spare = turns[piece][0].past
                if spare and not whole:
                    prompt.add(held)
                    held = []
                for content in _content(turns[piece]):
                    if isinstance(content, str):
                        held += self.tokenizer.encode(content)
                        continue
                    prompt.add(held, spare)
                    prompt.add(content)
                    held = []
                if spare and not whole:
                    prompt.add(held, True)
                    held = []
            prompt.add(held, whole)

    def _segments(self, roles: tuple[str, ...]) -> list[_Segment]:
        """The template for turns of these roles, cut where it is known which words belong to which turn."""
        if roles not in self._known:
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            turns = [(role, f"\ue000{i}\ue001") for i, role in enumerate(roles)]
            whole, at, found = render(self.template, turns), 0, []
            ends = [self._end(whole, turns[:count]) for count in range(len(turns) + 1)]
            ends[0] = self._begin(whole, turns[-1:], ends[-2]) if ends[0] is not None else None
            for number, (start, end) in enumerate(pairwise(ends)):
                if start is not None and end is not None and at <= start < end:
                    found += [(None, whole[at:start]), (number, whole[start:end])]
                    at = end
            found.append((None, whole[at:]))
            self._known[roles] = [_Segment(turn, self._pieces(text, len(turns))) for turn, text in found if text]
        return self._known[roles]

    def _end(self, whole: str, turns: list[tuple[str, str]]) -> int | None:
        """Where these first turns end in the filled template; None where it writes them otherwise with others behind."""
        try:
            begun = render(self.template, turns, answer=False)
        except SampleError:
            return None
        return len(begun) if whole.startswith(begun) else None

    def _begin(self, whole: str, last: list[tuple[str, str]], end: int | None) -> int:
        """Where the first turn begins: behind what the template says by itself, such as words for a system."""
        try:
            alone = render(self.template, last)
        except SampleError:
            return 0
        behind = whole[end:] if end is not None else whole
        before = alone.removesuffix(behind)
        return len(before) if before != alone and whole.startswith(before) else 0

    def _pieces(self, text: str, turns: int) -> list[list[int] | int]:
        pieces: list[list[int] | int] = []
        for number, found in enumerate(_STAND_IN.split(text)):
            if number % 2:
                pieces.append(min(int(found), turns - 1))
            elif found:
                pieces.append(self.tokenizer.encode_marks(found))
        return pieces


@dataclass(frozen=True, slots=True)
class _Segment:
    """Ids of the template's own words, and numbers of turns in between."""

    turn: int | None
    """The turn that all of it belongs to."""
    pieces: list[list[int] | int]


def _turns(pieces: list[Said]) -> list[list[Said]]:
    """The pieces of each turn. There is always one to be answered."""
    said = [s for s in pieces if s.role != "context"]
    turns = [list(group) for _, group in groupby(said, key=lambda s: (s.turn, s.role))]
    return turns if turns and turns[-1][0].role != "system" else [*turns, [Said("user")]]


def _content(turn: list[Said]) -> Iterator[str | tuple[int, ...]]:
    """Texts, below each other where several make a turn, and slots."""
    text, begun = "", False
    for said in turn:
        if said.slots:
            if text:
                yield text
            yield said.slots
            text = ""
        else:
            text += f"\n{said.text}" if begun else said.text
            begun = True
    if text:
        yield text


def render(template: str, turns: list[tuple[str, str]], answer: bool = True) -> str:
    """(role, text) turns as one text, with `answer` up to where it begins. Raises SampleError `unsupported`."""
    if template == "chatml":
        said = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)
        return said + "<|im_start|>assistant\n" * answer
    try:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise ConfigError("the chat template needs Jinja", cure="pip install jinja2") from None

    def refuse(message: str) -> None:
        raise SampleError("unsupported", f"the chat template refuses the turns ({message})")

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda _: "",
    }  # a shard must not hold today's date
    messages = [{"role": role, "content": text} for role, text in turns]
    try:
        made: str = environment.from_string(template).render(messages=messages, add_generation_prompt=answer)
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise SampleError(
            "unsupported", f"the chat template cannot be filled ({type(error).__name__}: {error})"
        ) from None
    if len(made) > MAX_TEMPLATE:
        raise SampleError("unsupported", f"a chat template that makes {len(made):,} characters of nothing")
    return made


def find_template(config: FeaturesConfig) -> str:
    """What `FeatureSpec.chat_template` is to be: a name, or the source of the template beside the given tokenizer.

    Raises ConfigError when there is none, or it cannot be filled with one question.
    """
    if config.chat_template != "tokenizer":
        return config.chat_template
    if not config.tokenizer.file:
        raise ConfigError(
            "features.chat_template: tokenizer",
            wanted="features.tokenizer.file",
            cure="give it, or say chatml or plain",
        )
    source = _read(Path(config.tokenizer.file).parent)
    try:
        render(source, [("user", "?")])
    except SampleError as error:
        raise ConfigError(f"features.chat_template: {error.found}", cure="say chatml or plain") from None
    return source


def _read(folder: Path) -> str:
    """The template in a folder, with the marks that it refers to set in its first line; `<bos>` is ours already."""
    source, marks = "", {}
    try:
        if (folder / FILES[1]).is_file():
            given: dict[str, Any] = json.loads((folder / FILES[1]).read_text(encoding="utf-8"))
            marks = {name: _text(given.get(name)) for name in ("eos_token", "pad_token", "unk_token")}
            found = given.get("chat_template")
            if isinstance(found, list):  # several by name
                found = next((one.get("template") for one in found if one.get("name") == "default"), None)
            source = found if isinstance(found, str) else ""
        if (folder / FILES[0]).is_file():
            source = (folder / FILES[0]).read_text(encoding="utf-8")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"the chat template in {folder} cannot be read ({error})") from None
    if not 0 < len(source) <= MAX_TEMPLATE:
        raise ConfigError(f"no chat template in {folder}", wanted=" or ".join(FILES), cure="say chatml or plain")
    set_ = "".join(
        "{%- set " + f"{name} = {json.dumps(text)}" + " -%}" for name, text in {"bos_token": "", **marks}.items()
    )
    return set_ + source


def _text(mark: Any) -> str:
    return mark if isinstance(mark, str) else str(mark.get("content", "")) if isinstance(mark, dict) else ""
