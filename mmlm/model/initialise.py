"""All initialisation in one place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from mmlm.model.transformer import FusedTransformer


def initialise(model: FusedTransformer) -> None:
    """Draw the weights of a FusedTransformer anew.

    Embeddings start at standard deviation 0.5: at 0.02 the keypad story's picture accuracy after 1,500 steps was
    .776 against .869. Linear maps keep the variance (1/√fan-in); what writes into the residual stream is scaled by
    1/√(2 layers) (GPT-2); the heads start near zero.
    """
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for stack in model.fusion.stacks(model):
        for block in stack:
            for out in (block.attention.out, block.feed_forward.out):  # type: ignore[union-attr]
                nn.init.normal_(out.weight, std=(out.in_features * 2 * len(stack)) ** -0.5)  # type: ignore
    for head in (model.answer, model.label):
        nn.init.normal_(head.weight, std=0.02)
