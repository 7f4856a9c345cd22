"""Settings of the small models for small data, and the choice among all models."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Discriminator, Field, Tag

from mmlm.config import Config
from mmlm.model.config import ModelConfig


class CnnConfig(Config):
    """Pictures and sounds (as spectrograms) through convolutions, answered by the class head alone: no word of the
    question is read, and none is answered."""

    kind: Literal["cnn"] = "cnn"
    channels: tuple[Annotated[int, Field(ge=1)], ...] = Field((32, 64, 128), min_length=1, max_length=6)
    """Of each stage: two convolutions of 3 x 3, the second with a stride of 2."""
    width: int = Field(128, ge=8)
    """Values that stand for a record before its classes are told apart."""
    embedding: int | None = Field(None, ge=2)
    """Size of the vector that a record becomes, for finding what means the same (`train.loss.contrastive`); none: no such
    head."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of them that is dropped while training."""


class RecurrentConfig(Config):
    """What both share."""

    kind: Literal["lstm", "gru"]
    width: int = Field(128, ge=8)
    """Size of the residual stream and of the state of a layer."""
    layers: int = Field(2, ge=1)
    embedding: int | None = Field(None, ge=2)
    """Size of the vector that a record becomes, for finding what means the same (`train.loss.contrastive`); none: no such
    head."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the residual updates that is dropped while training."""


class LstmConfig(RecurrentConfig):
    """Long short-term memory (Hochreiter & Schmidhuber 1997) over the same sequence as the Transformer's, read one
    position after the other."""

    kind: Literal["lstm"] = "lstm"


class GruConfig(RecurrentConfig):
    """Gated recurrent units (Cho et al. 2014): as `lstm`, with three gates instead of four."""

    kind: Literal["gru"] = "gru"


def _kind(value: Any) -> Any:
    """Without a kind it is the Transformer, as in every config before there was a choice."""
    return value.get("kind", "transformer") if isinstance(value, dict) else getattr(value, "kind", None)


AnyModelConfig: TypeAlias = Annotated[
    Annotated[ModelConfig, Tag("transformer")]
    | Annotated[CnnConfig, Tag("cnn")]
    | Annotated[LstmConfig, Tag("lstm")]
    | Annotated[GruConfig, Tag("gru")],
    Discriminator(_kind),
]
"""`kind`: transformer (default), cnn, lstm or gru."""
CONFIGS: dict[str, type[ModelConfig] | type[CnnConfig] | type[LstmConfig] | type[GruConfig]] = {
    "transformer": ModelConfig,
    "cnn": CnnConfig,
    "lstm": LstmConfig,
    "gru": GruConfig,
}
