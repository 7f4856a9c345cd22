"""Beam search: several unfinished answers of each record side by side, the best of all finished ones in the end.

Axes: B beam of any record (those of one record follow each other), V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from mmlm.model.answers import Answers, Row, caches_for
from mmlm.model.generation_config import GenerationConfig
from mmlm.model.sampling import penalised, words_only
from mmlm.model.transformer import FusedTransformer, Inputs


@dataclass
class Beam:
    """An answer as far as it has come."""

    row: Row
    sum: float = 0.0
    """Its log-probability, after the repetition penalty: by which beams are compared."""
    tokens: int = 0
    """With `<eos>`, where it was chosen."""
    place: int = 0
    """Its row in the cache, or that of the beam which it goes on from."""

    def worth(self, config: GenerationConfig) -> float:
        """log-probability / tokens ^ length_penalty, by which answers are compared (Wu et al. 2016, eq. 14, with the
        length itself for its lp)."""
        return self.sum / max(self.tokens, 1) ** config.length_penalty


@dataclass
class Hunt:
    """The beams of one record."""

    open: list[Beam]
    ended: list[Beam]

    def done(self, config: GenerationConfig) -> bool:
        """Whether nothing is open, or as many answers as beams have ended and no open one is better, as it stands, than
        the worst of these."""
        if not self.open or len(self.ended) < config.beams:
            return not self.open
        worst = sorted((beam.worth(config) for beam in self.ended), reverse=True)[config.beams - 1]
        return max(beam.worth(config) for beam in self.open) <= worst

    def best(self, config: GenerationConfig) -> Beam:
        """Of the ended ones, or where there is none, of those that were cut."""
        return max(self.ended or self.open, key=lambda beam: beam.worth(config))


def search(model: FusedTransformer, prompts: Inputs, limit: int, config: GenerationConfig, rows: list[Row]) -> Answers:
    """The best answer of each record; `rows` are empty."""
    caches = caches_for(model, limit)
    hidden_BD = model.read_prompts(prompts, caches)
    label_RC = model.label(hidden_BD).float()
    valid_BS = None if bool(prompts.valid_BT.all()) else prompts.valid_BT
    position_B = prompts.valid_BT.sum(1)
    hunts = [Hunt([Beam(row, place=n)], []) for n, row in enumerate(rows)]
    live = list(hunts)
    for step in range(limit):
        logits_BV = words_only(model.answer(hidden_BD).float())
        at = 0
        for hunt in live:
            n = len(hunt.open)
            _step(hunt, logits_BV[at : at + n], config)
            at += n
        live = [hunt for hunt in live if not hunt.done(config)]
        if not live or step + 1 == limit:
            break
        beams = [beam for hunt in live for beam in hunt.open]
        kept = [beam.place for beam in beams]
        for n, beam in enumerate(beams):
            beam.place = n
        for cache in caches:
            cache.keep(kept)
        rows_B = torch.tensor(kept, device=position_B.device)
        position_B = position_B[rows_B]
        if valid_BS is not None:
            valid_BS = F.pad(valid_BS[rows_B], (0, 1), value=True)
        token_B = torch.tensor([beam.row.ids[-1] for beam in beams], device=position_B.device)
        hidden_BD = model.extend(token_B, position_B, valid_BS, caches)
        position_B = position_B + 1
    best = [hunt.best(config) for hunt in hunts]
    return Answers([beam.row.ids for beam in best], torch.tensor([beam.row.log for beam in best]), label_RC)


def _step(hunt: Hunt, logits_BV: torch.Tensor, config: GenerationConfig) -> None:
    """Each beam goes on with each token. Of all these, the best as many as beams that are open are kept, and those that
    have ended and are better than the last of them."""
    V = logits_BV.shape[1]
    log_BV = logits_BV.log_softmax(-1)
    sum_BV = log_BV
    if config.repetition_penalty != 1:
        given = [beam.row.ids for beam in hunt.open]
        sum_BV = penalised(logits_BV, given, config.repetition_penalty).log_softmax(-1)
    if config.constrained:
        masks = [beam.row.follower.allowed() for beam in hunt.open if beam.row.follower is not None]
        sum_BV = sum_BV.masked_fill(~torch.stack(masks).to(sum_BV.device), -torch.inf)
    sum_BV = sum_BV + torch.tensor([[beam.sum] for beam in hunt.open], device=sum_BV.device)
    tried, opened, ended = 0, [], []  # type: ignore[var-annotated]
    while len(opened) < config.beams and tried < sum_BV.numel():
        # twice as many as beams are enough where answers end by <eos> only, once for each beam
        tried, opened, ended = min(max(2 * config.beams, 4 * tried), sum_BV.numel()), [], []
        values, flat = sum_BV.flatten().topk(tried)
        for value, at in zip(values.tolist(), flat.tolist(), strict=True):
            if value == -torch.inf or len(opened) == config.beams:
                break
            parent = hunt.open[at // V]
            beam = Beam(parent.row.branch(), value, parent.tokens + 1, parent.place)
            goes_on = beam.row.take(at % V, float(log_BV[at // V, at % V]))
            (opened if goes_on else ended).append(beam)
    hunt.open, hunt.ended = opened, hunt.ended + ended
