"""What an evaluation reads: the samples of a split, the models that answer, the words for tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mmlm.artifacts import Artifact
from mmlm.features.sample import Sample
from mmlm.features.spec import FeatureSpec
from mmlm.model.generation_config import GenerationConfig

CACHE_BYTES = 256 << 20
"""Decoded samples kept between rounds, bytes; a small test split is decoded once."""


class Samples(Protocol):
    """The samples of a split: `mmlm.data.reader.ShardReader`, or a list."""

    def __len__(self) -> int: ...
    def __getitem__(self, i: int, /) -> Sample: ...


class Answering(Protocol):
    """What evaluation needs of `answer.Answerer`."""

    def answer(
        self,
        samples: Sequence[Sample],
        *,
        batch_size: int = ...,
        given: frozenset[str] | None = ...,
        generation: GenerationConfig = ...,
    ) -> Sequence[Any]: ...


class Decoding(Protocol):
    def decode(self, ids: list[int]) -> str: ...


@dataclass
class Bench:
    """All that an evaluation reads: how a split is opened, who answers, and the words for tokens."""

    read: Callable[[str], Samples]
    models: Mapping[str, Answering]
    spec: FeatureSpec
    tokenizer: Decoding


def open_bench(shards: Artifact, models: Mapping[str, Artifact]) -> Bench:
    """The real readers and models. A GPU is used where there is one: answers then may differ in the last digits."""
    import torch

    from mmlm.data.reader import ShardReader
    from mmlm.evals.answer import Answerer
    from mmlm.features import spec as feature_spec
    from mmlm.features.text import Tokenizer

    spec = feature_spec.load(shards.path)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    answerers: dict[str, Answering] = {}
    for name, checkpoint in models.items():
        answerer = Answerer(checkpoint.path, device)
        feature_spec.require_same(answerer.spec, spec)
        answerers[name] = answerer
    return Bench(
        lambda split: ShardReader(shards.path, (split,), cache_bytes=CACHE_BYTES),
        answerers, spec, Tokenizer.load(shards.path),
    )  # fmt: skip
