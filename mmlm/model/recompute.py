"""Activation checkpointing: what a block computed is not kept for the backward pass, but computed again in it.

`full` keeps only what a block reads (Chen et al. 2016). `selective` also keeps what its linear layers gave, and computes again
what costs little and takes up much: norms, rotations, activations, scores and probabilities of attention (Korthikanti et
al. 2022, section 5). Neither changes a number.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

Granularity = Literal["full", "selective"]
MAPS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
"""What linear layers come down to; the products of attention are others."""


class Recompute(NamedTuple):
    """Which blocks are run again, and how much of them."""

    every: int = 0
    """Every how manieth block; 0 is none."""
    granularity: Granularity = "full"

    def through(self, n: int, block: nn.Module, *given: Any) -> Any:
        """`block(*given)`, number `n` of its stack."""
        if not self.every or n % self.every or not block.training:
            return block(*given)
        kept = noop_context_fn if self.granularity == "full" else _keeping_maps
        return checkpoint(block, *given, use_reentrant=False, context_fn=kept)


NONE = Recompute()


def _policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in MAPS else CheckpointPolicy.PREFER_RECOMPUTE


_keeping_maps = functools.partial(create_selective_checkpoint_contexts, _policy)
