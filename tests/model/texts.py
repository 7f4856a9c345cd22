"""Sequences of text alone, and what a model says about the next token at each of their positions."""

from __future__ import annotations

import numpy as np
import torch

from mmlm.data.collate import collate
from mmlm.features.sample import Sample
from mmlm.features.spec import FeatureSpec
from mmlm.model.transformer import FusedTransformer
from tests.small import SPEC


def texts(vocabulary: int, lengths: tuple[int, ...]) -> list[torch.Tensor]:
    """Random ids, no marks among them."""
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(9, vocabulary, (n,), generator=draw) for n in lengths]


def logits_of(net: FusedTransformer, ids: torch.Tensor, spec: FeatureSpec = SPEC) -> torch.Tensor:
    """(T, V) of one sequence; `spec` is that of the model."""
    one = Sample("s", spec.tasks[0].name, ids.numpy().astype(np.int32), len(ids) - 1)
    return net.answer(net.trunk(collate([one], spec, with_answer=False)))
