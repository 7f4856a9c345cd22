"""How the turns before an answer are laid out as tokens.

A template is filled with stand-ins, never with what people wrote: its own words are encoded with the tokenizer's marks
(such as `<|im_start|>`), the turns as plain text. So a text can neither pose as a turn nor change the template.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mmlm.errors import ConfigError
from mmlm.features.config import FeaturesConfig
from mmlm.features.failures import SampleError
from mmlm.features.text import Tokenizer

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{{ '<|im_start|>assistant\\n' }}"
)
"""For people to read; `chatml` gives what this Jinja template gives, without Jinja."""
MAX_TEMPLATE = 1 << 17
"""Longest template, and longest text made of one, characters."""
FILES = ("chat_template.jinja", "tokenizer_config.json")
_STAND_IN = re.compile("\ue000([0-9]+)\ue001")
"""Private-use characters around a number, in place of a turn's text."""


class Chat:
    """Lays out turns by one template: `plain`, `chatml` or the source of a Jinja template."""

    def __init__(self, template: str, tokenizer: Tokenizer) -> None:
        self.template, self.tokenizer = template, tokenizer
        self._known: dict[tuple[str, ...], list[list[int] | int]] = {}

    def encode(self, turns: list[tuple[str, str]]) -> list[int]:
        """Ids of (role, text) turns: roles `system` and `user`; what is neither counts as `user`.

        `plain`: the texts below each other. Otherwise the system's texts come first as one turn, the user's follow as
        one, then whatever the template puts before an answer. Raises SampleError `unsupported` when it refuses them.
        """
        if self.template == "plain":
            return self.tokenizer.encode("\n".join(text for _, text in turns))
        system = "\n".join(text for role, text in turns if role == "system")
        user = "\n".join(text for role, text in turns if role != "system")
        given = [("system", system)] * bool(system) + [("user", user)]
        ids: list[int] = []
        for piece in self._pieces(tuple(role for role, _ in given)):
            ids += self.tokenizer.encode(given[piece][1]) if isinstance(piece, int) else piece
        return ids

    def _pieces(self, roles: tuple[str, ...]) -> list[list[int] | int]:
        """The template for turns of these roles: ids of its own words, and numbers of turns."""
        if roles not in self._known:
            rendered = render(self.template, [(role, f"\ue000{i}\ue001") for i, role in enumerate(roles)])
            pieces: list[list[int] | int] = []
            for number, text in enumerate(_STAND_IN.split(rendered)):
                if number % 2:
                    pieces.append(min(int(text), len(roles) - 1))
                elif text:
                    pieces.append(self.tokenizer.encode_marks(text))
            self._known[roles] = pieces
        return self._known[roles]


def render(template: str, turns: list[tuple[str, str]]) -> str:
    """(role, text) turns as one text, up to where the answer begins. Raises SampleError `unsupported`."""
    if template == "chatml":
        return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns) + "<|im_start|>assistant\n"
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
        made: str = environment.from_string(template).render(messages=messages, add_generation_prompt=True)
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
