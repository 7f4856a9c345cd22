"""Settings of packing, of the order, and of what happens to a sample on its way into a batch."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field

from mmlm.config import Config


def _rising(ends: tuple[float, float]) -> tuple[float, float]:
    if ends[0] > ends[1]:
        raise ValueError("the smaller factor comes first")
    return ends


Factor = Annotated[float, Field(ge=0.1, le=10)]
Zoom = Annotated[tuple[Factor, Factor], AfterValidator(_rising)]


class AugmentConfig(Config):
    """Random changes to training samples; a pure function of (seed, position), so the same on any number of ranks."""

    added: ClassVar[tuple[str, ...]] = ("turn", "zoom")
    shift: int = Field(0, ge=0)
    """Pictures are moved by up to this many pixels in both directions, their edge repeated."""
    flip: bool = False
    """Half of the pictures are mirrored left to right."""
    turn: float = Field(0.0, ge=0, le=180)
    """Pictures are turned by up to this many degrees either way about their middle, their edge repeated."""
    zoom: Zoom = (1.0, 1.0)
    """Pictures are enlarged by a factor between these two, evenly by its logarithm, about their middle; below 1 they become
    smaller, their edge repeated."""
    contrast: float = Field(0.0, ge=0, lt=1)
    """Colour channels are scaled by factors from 1 - contrast to 1 + contrast."""
    time_mask: float = Field(0.0, ge=0, lt=1)
    """Up to this share of a sound's frames, in one run, is silenced."""
    mel_mask: int = Field(0, ge=0)
    """Up to this many neighbouring mel bins are silenced (SpecAugment, Park et al. 2019)."""

    @property
    def resamples(self) -> bool:
        """Whether pictures are turned or zoomed."""
        return self.turn > 0 or self.zoom != (1.0, 1.0)


class NoPacking(Config):
    """One record a sequence; shorter ones are padded to the longest of their batch."""

    kind: Literal["none"] = "none"


class BestFitPacking(Config):
    """Several records a sequence, planned ahead: each goes where the least room is left (best fit, longest first).

    Attention and positions never cross records. Only records of one stream of the mixture share a sequence.
    """

    kind: Literal["best_fit"]
    length: int | None = Field(None, ge=8)
    """Positions of a sequence, opened media slots included. None: `features.max_len` of the shards."""
    window: int = Field(16, ge=1)
    """Shards whose records are packed together; more pad less, and fewer keep what is read together near."""
    on_long: Literal["split", "refuse"] = "split"
    """Records longer than a sequence: split into pieces, of which every token is learnt from (text only), or left out.
    Both are counted. Longer than `features.max_len` there are only if the shards keep them (`features.on_long: keep`)."""


PackConfig = Annotated[NoPacking | BestFitPacking, Field(discriminator="kind")]
By = Literal["source", "task", "source/task"]


MOST = 1e15
"""Of a weight or a share: far above any count of tokens, and sums stay finite."""


def _some_positive(weights: dict[str, float]) -> dict[str, float]:
    if not any(weights.values()):
        raise ValueError("all of them are 0, one at least must not be")
    return weights


Weights = Annotated[
    dict[str, Annotated[float, Field(ge=0, le=MOST)]], Field(min_length=1), AfterValidator(_some_positive)
]


class NaturalMixture(Config):
    """Every record once an epoch, whatever it comes from."""

    kind: Literal["natural"] = "natural"


class WeightedMixture(Config):
    """Each stream has a fixed share of every batch. A small stream with a large weight is gone through more often."""

    kind: Literal["weighted"]
    by: By = "source"
    """What tells streams apart: where a record comes from, its task, or both, as in `reviews.csv/mood`."""
    weights: Weights
    """stream → its share of a batch, relative to the others; every stream is named, 0 leaves it out."""


class Phase(Config):
    share: float = Field(gt=0, le=MOST)
    """Part of the steps, relative to the other phases."""
    weights: Weights
    """As of a weighted mixture."""


class PhasedMixture(Config):
    """A curriculum: weights that change as the steps go by."""

    kind: Literal["phases"]
    by: By = "source"
    """What tells streams apart: where a record comes from, its task, or both."""
    phases: tuple[Phase, ...] = Field(min_length=1)
    """One after the other."""


MixtureConfig = Annotated[NaturalMixture | WeightedMixture | PhasedMixture, Field(discriminator="kind")]


class DataConfig(Config):
    batch: int = Field(128, ge=1)
    """Sequences of one optimizer step, over all ranks; without packing a sequence is a record."""
    pack: PackConfig = NoPacking()
    """How records become sequences."""
    mixture: MixtureConfig = NaturalMixture()
    """How much of a batch comes from where."""
    modality_dropout: float = Field(0.25, ge=0, le=1)
    """Share of samples that lose some of their modalities, so that the model also answers without them."""
    augment: AugmentConfig = AugmentConfig()
