"""Which token comes next, given the logits: marks left out, repetition punished, the unlikely cut off, one drawn.

Axes: B record, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mmlm.features.spec import EOS, SPECIAL_TOKENS
from mmlm.model.generation_config import GenerationConfig


def words_only(logits_XV: torch.Tensor) -> torch.Tensor:
    """Logits in which no special token but `<eos>` can be chosen: a slot in an answer would mean nothing."""
    words_XV = logits_XV.clone()
    words_XV[..., :EOS] = -torch.inf
    words_XV[..., EOS + 1 : len(SPECIAL_TOKENS)] = -torch.inf
    return words_XV


def penalised(logits_BV: torch.Tensor, given: Sequence[Sequence[int]], penalty: float) -> torch.Tensor:
    """Logits of the tokens that each record's answer has already, l / penalty where l > 0, l * penalty elsewhere, each
    token once however often it came (Keskar et al. 2019, section 4.1)."""
    rows = [b for b, ids in enumerate(given) for _ in ids]
    if penalty == 1 or not rows:
        return logits_BV
    at = torch.tensor([rows, [i for ids in given for i in ids]], device=logits_BV.device)
    old = logits_BV[at[0], at[1]]
    return logits_BV.index_put((at[0], at[1]), torch.where(old > 0, old / penalty, old * penalty))


def shares(logits_BV: torch.Tensor, config: GenerationConfig) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Probabilities that sum to 1, and the tokens that they belong to (both (B, W), the most probable first), or None
    where it is the whole vocabulary in its order.

    Temperature first, then top-k, top-p and min-p, each on what the one before has left.
    """
    # The most probable token stays at 0 however small the temperature is, of which even the inverse must be finite.
    temperature = max(config.temperature, torch.finfo(logits_BV.dtype).tiny)
    logits_BV = (logits_BV - logits_BV.amax(-1, True)) / temperature
    if config.top_k is None and config.top_p == 1:
        share_BV = logits_BV.softmax(-1)
        if config.min_p:
            share_BV = torch.where(share_BV < config.min_p * share_BV.max(-1, True).values, 0, share_BV)
        return share_BV / share_BV.sum(-1, True), None
    W = min(config.top_k or logits_BV.shape[-1], logits_BV.shape[-1])
    kept_BW, token_BW = logits_BV.topk(W)
    share_BW = kept_BW.softmax(-1)
    before_BW = share_BW.cumsum(-1) - share_BW
    share_BW = torch.where(before_BW < config.top_p, share_BW, 0)
    share_BW = torch.where(share_BW < config.min_p * share_BW[:, :1], 0, share_BW)
    return share_BW / share_BW.sum(-1, True), token_BW


def drawn(logits_BV: torch.Tensor, config: GenerationConfig, uniform: Sequence[float]) -> torch.Tensor:
    """One token of each record, (B,), by a number from [0, 1) of its own: the first at which the probabilities, added up,
    exceed it."""
    share_BW, token_BW = shares(logits_BV, config)
    reached_BW = share_BW.double().cumsum(-1)
    u_B1 = torch.tensor(uniform, dtype=torch.float64, device=share_BW.device)[:, None]
    at_B1 = torch.searchsorted(reached_BW, u_B1 * reached_BW[:, -1:], right=True)
    last_B1 = share_BW.shape[-1] - 1 - (share_BW > 0).flip(-1).int().argmax(-1, True)
    at_B1 = torch.minimum(at_B1, last_B1)
    return (at_B1 if token_BW is None else token_BW.gather(1, at_B1))[:, 0]
