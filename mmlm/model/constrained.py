"""Answers that are one of some choices, or JSON that follows a schema: which tokens may come next, by llguidance."""

from __future__ import annotations

import functools
import json
import re
from typing import Any, Protocol

import numpy as np
import torch

from mmlm.errors import ConfigError
from mmlm.features.spec import EOS
from mmlm.model.generation_config import GenerationConfig

COMPACT = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}
"""JSON without white space between its parts, which some models would go on writing for ever."""


class Words(Protocol):
    """What generation asks of a tokenizer; `mmlm.features.text.Tokenizer` is one."""

    json: str
    """The `tokenizer.json`."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def moved(self) -> int:
        """By how much our ids are larger than those in `json`."""
        ...

    def decode(self, ids: list[int]) -> str: ...


class Grammar:
    """What an answer has to look like. Raises ConfigError for a schema that cannot be followed."""

    def __init__(self, config: GenerationConfig, words: Words) -> None:
        inner = _llguidance().LLMatcher
        if config.choices:
            grammar = inner.grammar_from_regex("|".join(re.escape(choice) for choice in config.choices))
        else:
            grammar = inner.grammar_from_json_schema(json.dumps(config.json_schema), overrides=COMPACT)
        self.words, (self.tokenizer, self.end) = words, _tokenizer(words.json, words.moved)
        if wrong := inner.validate_grammar(grammar, self.tokenizer):
            what = "generation.choices" if config.choices else "generation.json_schema"
            raise ConfigError(f"{what} cannot be followed ({_first(wrong)})", wanted="a schema that llguidance knows")
        self.first = inner(self.tokenizer, grammar)

    def follower(self) -> Follower:
        """For one more answer, from its beginning."""
        return Follower(self, self.first.deep_copy())


class Follower:
    """Where one answer stands in its grammar."""

    def __init__(self, grammar: Grammar, inner: Any) -> None:
        self.grammar, self.inner = grammar, inner

    def allowed(self) -> torch.Tensor:
        """(V,) bool: the tokens that may come next, `<eos>` where the answer may end. Raises ConfigError when the grammar
        is too involved."""
        mask, end, moved = self.inner.compute_bitmask(), self.grammar.end, self.grammar.words.moved
        if self.inner.is_error():
            raise ConfigError(f"the grammar cannot be followed ({_first(self.inner.get_error())})", cure="simplify it")
        bits = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little").view(bool)
        allowed = np.zeros(self.grammar.words.vocab_size, bool)
        taken = min(len(bits), len(allowed) - moved)
        allowed[moved : moved + taken] = bits[:taken]
        if end + moved < len(allowed):
            allowed[end + moved] = False
        allowed[EOS] = bits[end]
        return torch.from_numpy(allowed)

    def take(self, token: int) -> None:
        self.inner.consume_token(token - self.grammar.words.moved)

    @property
    def done(self) -> bool:
        """Whether nothing can follow."""
        return bool(self.inner.is_stopped())

    def copy(self) -> Follower:
        return Follower(self.grammar, self.inner.deep_copy())


@functools.lru_cache(maxsize=2)
def _tokenizer(text: str, moved: int) -> tuple[Any, int]:
    """llguidance's form of a `tokenizer.json`, and its id for the end of an answer. One that is not ours gets a token for
    that, of a name that no text holds."""
    end = EOS
    if moved:
        given = json.loads(text)
        ids = [*given["model"].get("vocab", {}).values(), *(t["id"] for t in given["added_tokens"])]
        end = max(i for i in ids if isinstance(i, int)) + 1
        mark = {"id": end, "content": "<end of the answer>", "special": True, "single_word": False, "lstrip": False}
        given["added_tokens"].append({**mark, "rstrip": False, "normalized": False})
        text = json.dumps(given)
    return _llguidance().LLTokenizer(text, eos_token=end), end


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise ConfigError(
            "choices and JSON schemas need llguidance, which is not installed",
            cure="install the extra `constrained`: pip install 'mmlm-workflows[constrained]'",
        ) from None
    return llguidance


def _first(text: str) -> str:
    return " ".join(text.split())[:200]
