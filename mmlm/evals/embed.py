"""Embeddings of samples: one vector each, whatever modality they give; what means the same lies near."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from mmlm.data.collate import collate
from mmlm.data.modalities import alone
from mmlm.errors import ConfigError
from mmlm.evals.answer import Answerer, prompt_length
from mmlm.features.sample import Sample


def embed(
    answerer: Answerer, samples: Iterable[Sample], given: frozenset[str] | None = None, *, batch_size: int = 128
) -> np.ndarray:
    """(N, E) float32: the vector, of length 1, of each sample's modalities (image, audio, fields, context) among `given`,
    by default all that it has; the question is left out.

    Raises ConfigError when the model has no embedding head.
    """
    size = answerer.model.config.embedding
    if not size:
        raise ConfigError(
            f"{answerer.folder} makes no embeddings", wanted="a model with an embedding head",
            cure="train with model.embedding and loss.contrastive; of a run with a student, give RUN/model, the teacher",
        )  # fmt: skip
    rows = [alone(s, frozenset(s.modalities) if given is None else given) for s in samples]
    found = np.zeros((len(rows), size), np.float32)
    order = np.argsort([prompt_length(s, answerer.spec) for s in rows], kind="stable")
    for first in range(0, len(rows), batch_size):
        chosen = order[first : first + batch_size]
        batch = collate([rows[i] for i in chosen], answerer.spec, with_answer=False).to(answerer.device)
        with torch.inference_mode():
            found[chosen] = answerer.model(batch).embedding_RE.cpu().numpy()
    return found
