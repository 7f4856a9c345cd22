"""Settings of the evaluation: what is scored, what is given to the model, and how sure a score must be."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from mmlm.config import Config
from mmlm.model.generation_config import GenerationConfig

Modality = Literal["context", "fields", "image", "audio", "video"]


class BootstrapConfig(Config):
    """Percentile bootstrap over records, or over groups of records where several records share one."""

    samples: int = Field(1000, ge=100, le=100_000)
    """Resamples of the test records per score."""
    confidence: float = Field(0.95, gt=0.5, lt=1)
    """Share of resamples inside the interval."""
    seed: int = 0


class LogisticConfig(Config):
    """A logistic regression on the same stored features: what a model without depth reaches."""

    enabled: bool = True
    max_records: int = Field(4000, ge=10)
    """Training records used at most, per task; evenly taken from the training split."""
    strengths: list[float] = Field([0.003, 0.1], min_length=1)
    """Inverse regularisation strengths that are tried; the validation split chooses among several."""


class BaselinesConfig(Config):
    """Rows that stand beside the models in every table."""

    majority: bool = True
    """The most frequent class, or answer, of the training split."""
    logistic: LogisticConfig = LogisticConfig()


class EvaluateConfig(Config):
    """What `evaluate` measures."""

    splits: list[Literal["train", "val", "test"]] = Field(["test"], min_length=1)
    """Splits that are scored; `register` compares models on `test`."""
    given: list[list[Modality]] | None = None
    """What is given beside the question, one row of scores each, such as [[image, audio], [image]]; the first
    is the headline. Absent: all together, each modality taken away, and each alone."""
    generation: GenerationConfig = GenerationConfig()
    """How answers are worded; by default the most probable word after word. Served models do the same unless a question
    asks for another way."""
    bootstrap: BootstrapConfig = BootstrapConfig()
    min_n_per_language: int = Field(20, ge=1)
    """Records of one language in the split below which no score of that language is given."""
    batch_size: int = Field(64, ge=1)
    """Questions answered at once. Scores do not depend on it."""
    max_records: int | None = Field(None, ge=1)
    """At most this many records per task and split, taken by the hash of their id; absent: all."""
    baselines: BaselinesConfig = BaselinesConfig()
    examples: int = Field(24, ge=0, le=500)
    """Questions shown in the report per task, wrong answers first."""

    @field_validator("given")
    @classmethod
    def _no_empty_set(cls, given: list[list[Modality]] | None) -> list[list[Modality]] | None:
        if given is not None and (not given or any(not g or len(set(g)) < len(g) for g in given)):
            raise ValueError("each entry names one or more modalities, each once, such as [[image, audio], [image]]")
        return given
