"""Greedy generation with a key-value cache: one pass over the prompt, then one token at a time."""

from __future__ import annotations

import torch

from mmlm.features.spec import EOS, PAD, SPECIAL_TOKENS
from mmlm.model.attention import Cache
from mmlm.model.transformer import FusedTransformer, Inputs


@torch.no_grad()
def generate(
    model: FusedTransformer, prompts: Inputs, limit: int
) -> tuple[list[list[int]], torch.Tensor, torch.Tensor]:
    """Answers to left-padded prompts that all end with `<answer>`.

    Returns the token ids of each answer without `<eos>`, the summed log-probability of each answer (B,), and the
    class logits (B, C) read at `<answer>`. `limit` is the longest answer, tokens.
    """
    caches = [Cache() for _ in model.blocks]
    hidden_BD = model.read_prompts(prompts, caches)
    label_BC = model.label(hidden_BD).float()
    valid_BS = prompts.valid_BT
    position_B = valid_BS.sum(1)
    B = len(valid_BS)
    ids: list[list[int]] = [[] for _ in range(B)]
    score_B = torch.zeros(B, device=valid_BS.device)
    open_B = torch.ones(B, dtype=torch.bool, device=valid_BS.device)
    for _ in range(limit):
        log_BV = words_only(model.answer(hidden_BD).float()).log_softmax(-1)
        best_B, token_B = log_BV.max(-1)
        score_B = score_B + best_B * open_B
        open_B = open_B & (token_B != EOS)
        token_B = torch.where(open_B, token_B, PAD)
        for b, (token, still) in enumerate(zip(token_B.tolist(), open_B.tolist(), strict=True)):
            if still:
                ids[b].append(token)
        if not bool(open_B.any()):
            break
        valid_BS = torch.cat([valid_BS, open_B[:, None]], 1)
        hidden_BD = model.extend(token_B, position_B, valid_BS, caches)
        position_B = position_B + 1
    return ids, score_B, label_BC


def words_only(logits_XV: torch.Tensor) -> torch.Tensor:
    """Logits in which no special token but `<eos>` can be chosen: a slot in an answer would mean nothing."""
    barred = torch.zeros(logits_XV.shape[-1], dtype=torch.bool, device=logits_XV.device)
    barred[: len(SPECIAL_TOKENS)] = True
    barred[EOS] = False
    return logits_XV.masked_fill(barred, -torch.inf)
