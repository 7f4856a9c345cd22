"""How modalities meet: one choice, told apart by `kind`. The plain word (`fusion: add`) is the choice with its defaults."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from mmlm.config import Config


class ConcatConfig(Config):
    """Tokens of all modalities in one sequence, each sees the others in every layer."""

    kind: Literal["concat"] = "concat"


class AddConfig(Config):
    """Each picture, sound and set of fields is read by an encoder of its own; the mean of what it gives is added to the
    tokens of the record's text."""

    kind: Literal["add"] = "add"
    layers: int = Field(1, ge=1)
    """Blocks of each modality's encoder."""


class CrossAttentionConfig(Config):
    """The text asks the encoded pictures, sounds and fields of its record in gated layers between its blocks (Flamingo,
    Alayrac et al. 2022)."""

    kind: Literal["cross_attention"] = "cross_attention"
    layers: int = Field(1, ge=1)
    """Blocks of each modality's encoder."""
    every: int = Field(1, ge=1)
    """A gated layer stands before every how manieth block."""
    gate: float = 0.5
    """What the gates begin with, before tanh. 0, as in Flamingo, leaves a pretrained language model as it was."""


class AdversarialConfig(Config):
    """`concat`, and a discriminator that tells from what enters the last block which modality it is of, against which the
    blocks before it are trained (Ganin & Lempitsky 2015)."""

    kind: Literal["adversarial"] = "adversarial"
    weight: float = Field(0.01, gt=0)
    """Of the discriminator's cross-entropy among the terms of the loss, per modality of a record. At .1, digits by picture
    and sound came to .76 instead of .89 (AV-Digits): alike is not yet meaningful."""
    ramp: float = Field(10.0, ge=0)
    """How fast the reversed gradient grows with the share p of the steps that are done: 2 / (1 + exp(-ramp p)) - 1."""
    width: int = Field(64, ge=1)
    """Hidden size of the discriminator."""


class LateConfig(Config):
    """An expert for each modality, which sees nothing of the others; their answers are multiplied (Hinton 2002)."""

    kind: Literal["late"] = "late"


def _spelled_out(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


def _kind(value: Any) -> Any:
    return value.get("kind", "concat") if isinstance(value, dict) else getattr(value, "kind", None)


FusionConfig = Annotated[
    Annotated[ConcatConfig, Tag("concat")]
    | Annotated[AddConfig, Tag("add")]
    | Annotated[CrossAttentionConfig, Tag("cross_attention")]
    | Annotated[AdversarialConfig, Tag("adversarial")]
    | Annotated[LateConfig, Tag("late")],
    Discriminator(_kind),
    BeforeValidator(_spelled_out),
]
