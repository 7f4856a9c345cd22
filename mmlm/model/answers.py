"""Answers in the making: their tokens, what is drawn for them, what they must look like, when they end.

Axes: R record, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch

from mmlm.errors import ConfigError
from mmlm.features.spec import EOS
from mmlm.model.attention import Cache
from mmlm.model.constrained import Follower, Grammar, Words
from mmlm.model.generation_config import GenerationConfig
from mmlm.model.pieces import Pieces
from mmlm.model.transformer import FusedTransformer

ROOM = 32
"""Columns of the cache taken ahead for answers, at most."""


class Answers(NamedTuple):
    ids: list[list[int]]
    """The tokens of each answer, without `<eos>`; with those that a stop text ends in."""
    log_score_R: torch.Tensor
    """Its log-probability under the model alone, whatever drew or constrained it; `<eos>` included where it was chosen."""
    label_RC: torch.Tensor
    """Class logits, read at `<answer>`."""


@dataclass
class Row:
    """One answer, as far as it has come."""

    number: int
    """Of its record among the prompts."""
    random: np.random.Generator
    pieces: Pieces | None = None
    follower: Follower | None = None
    ids: list[int] = field(default_factory=list)
    log: float = 0.0
    """Its log-probability under the model alone."""
    new: str = ""
    """The text that the last token has made certain."""

    def take(self, token: int, log: float) -> bool:
        """Add a token and its log-probability. Whether the answer goes on."""
        self.new, self.log = "", self.log + log
        if token == EOS:
            return False
        self.ids.append(token)
        if self.pieces is not None:
            self.new = self.pieces.push(token)
        if self.follower is not None:
            self.follower.take(token)
            if self.follower.done:
                return False
        return self.pieces is None or not self.pieces.stopped

    def branch(self) -> Row:
        """A copy that goes its own way."""
        return replace(
            self, ids=list(self.ids), pieces=self.pieces.copy() if self.pieces else None,
            follower=self.follower.copy() if self.follower else None,
        )  # fmt: skip


def rows_for(
    config: GenerationConfig, words: Words | None, seeds: Sequence[int], *, in_pieces: bool = False
) -> list[Row]:
    """Empty answers, one for each seed. Raises ConfigError for a schema that cannot be followed."""
    grammar = Grammar(config, _needed(words)) if config.constrained else None
    return [
        Row(
            number, np.random.Generator(np.random.Philox(seed)),
            Pieces(_needed(words).decode, config.stop) if config.stop or in_pieces else None,
            grammar.follower() if grammar else None,
        )
        for number, seed in enumerate(seeds)
    ]  # fmt: skip


def _needed(words: Words | None) -> Words:
    if words is None:
        raise ConfigError("stop texts, choices, JSON schemas and pieces of text", wanted="the tokenizer")
    return words


def caches_for(model: FusedTransformer, limit: int) -> list[Cache]:
    """One a block, empty."""
    return [Cache(min(limit, ROOM)) for _ in model.blocks]
