"""Generation with a key-value cache: one pass over the prompts, then one token at a time of the answers still open.

An answer that has ended leaves the batch: it costs nothing from then on. Nothing of a record depends on its neighbours.

Axes: B open answer, S position in the cache, V vocabulary, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from mmlm.features.spec import EOS
from mmlm.model.attention import Cache
from mmlm.model.generation_config import GREEDY, GenerationConfig
from mmlm.model.sampling import drawn, penalised, words_only
from mmlm.model.transformer import FusedTransformer, Inputs

ROOM = 32
"""Columns of the cache taken ahead for answers, at most."""


class Answers(NamedTuple):
    ids: list[list[int]]
    """The tokens of each answer, without `<eos>`."""
    log_score_R: torch.Tensor
    """Its log-probability, `<eos>` included."""
    label_RC: torch.Tensor
    """Class logits, read at `<answer>`."""


@dataclass
class Row:
    """One answer, as far as it has come."""

    number: int
    """Of its record among the prompts."""
    random: np.random.Generator
    ids: list[int] = field(default_factory=list)

    def take(self, token: int) -> bool:
        """Add a token. Whether the answer goes on."""
        if token == EOS:
            return False
        self.ids.append(token)
        return True


class Run:
    """Answers to some prompts in the making; every step is a token of each that is still open."""

    def __init__(
        self, model: FusedTransformer, prompts: Inputs, limit: int, config: GenerationConfig, seeds: Sequence[int]
    ) -> None:
        self.model, self.limit, self.config = model, limit, config
        self.caches = [Cache(min(limit, ROOM)) for _ in model.blocks]
        self.hidden_BD = model.read_prompts(prompts, self.caches)
        self.label_RC = model.label(self.hidden_BD).float()
        self.valid_BS = None if bool(prompts.valid_BT.all()) else prompts.valid_BT
        self.position_B = prompts.valid_BT.sum(1)
        self.score_R = torch.zeros(len(self.hidden_BD), device=self.hidden_BD.device)
        self.rows = [Row(n, np.random.Generator(np.random.Philox(seed))) for n, seed in enumerate(seeds)]
        self.open = list(self.rows)

    def __iter__(self) -> Iterator[list[Row]]:
        """The answers that have a token more, step by step."""
        for step in range(self.limit):
            logits_BV = words_only(self.model.answer(self.hidden_BD).float())
            token_B = self.choose(logits_BV)
            log_BV = logits_BV.log_softmax(-1)
            at = torch.tensor([row.number for row in self.open], device=token_B.device)
            self.score_R[at] += log_BV.gather(1, token_B[:, None])[:, 0]
            taken = zip(self.open, token_B.tolist(), strict=True)
            going = [n for n, (row, token) in enumerate(taken) if row.take(token)]
            yield self.open
            if not going or step + 1 == self.limit:
                return
            self.extend(token_B, going)

    def choose(self, logits_BV: torch.Tensor) -> torch.Tensor:
        logits_BV = penalised(logits_BV, [row.ids for row in self.open], self.config.repetition_penalty)
        if not self.config.temperature:
            return logits_BV.argmax(-1)
        return drawn(logits_BV, self.config, [row.random.random() for row in self.open])

    def extend(self, token_B: torch.Tensor, going: list[int]) -> None:
        """The next hidden states of the answers that go on; the others leave."""
        if len(going) < len(self.open):
            kept = closed_up(going)
            at = torch.tensor(kept, device=token_B.device)
            token_B, self.position_B = token_B[at], self.position_B[at]
            self.valid_BS = None if self.valid_BS is None else self.valid_BS[at]
            self.open = [self.open[n] for n in kept]
            for cache in self.caches:
                cache.keep(kept)
        if self.valid_BS is not None:
            self.valid_BS = torch.nn.functional.pad(self.valid_BS, (0, 1), value=True)
        self.hidden_BD = self.model.extend(token_B, self.position_B, self.valid_BS, self.caches)
        self.position_B = self.position_B + 1


def closed_up(going: list[int]) -> list[int]:
    """Rows that stay, such that holes are filled from the end and nothing else moves: [0, 2, 3, 5] → [0, 5, 2, 3]."""
    n = len(going)
    late = [row for row in going if row >= n]
    stays = set(going)
    return [row if row in stays else late.pop() for row in range(n)]


@torch.no_grad()
def generate(
    model: FusedTransformer,
    prompts: Inputs,
    limit: int,
    config: GenerationConfig = GREEDY,
    *,
    seeds: Sequence[int] | None = None,
) -> Answers:
    """Answers to left-padded prompts that all end with `<answer>`, of at most `limit` tokens.

    `seeds`: one for each prompt; by default the config's for all.
    """
    run = Run(model, prompts, limit, config, seeds or [config.seed] * len(prompts.valid_BT))
    for _ in run:
        pass
    return Answers([row.ids for row in run.rows], run.score_R, run.label_RC)
