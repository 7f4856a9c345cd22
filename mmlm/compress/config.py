"""Settings of distillation."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from mmlm.config import Config
from mmlm.model.baseline_config import AnyModelConfig
from mmlm.model.config import ModelConfig
from mmlm.train.config import LoopConfig


class TeacherConfig(Config):
    """A text classifier of transformers."""

    folder: str = ""
    """A `…ForSequenceClassification` on local disk, with its tokenizer and safetensors, whose classes are those of a task.
    Its content counts, not where it lies."""
    digest: str = ""
    """sha256 of its files; given, another content is refused."""


class DistillConfig(LoopConfig):
    """A smaller model learns from the teacher's logits and from the data (Hinton et al. 2015)."""

    model: AnyModelConfig = ModelConfig(width=80)
    """The student."""
    teacher: TeacherConfig | None = None
    """Who leads the student on the class head; none: the model that was trained, on the words of answers as well."""
    temperature: float = Field(2.0, gt=0)
    """Both distributions are softened by it; the divergence is multiplied by its square."""
    task: float = Field(0.5, ge=0)
    """Weight of the task loss beside the divergence from the teacher, whose weight is 1."""
    scratch: bool = False
    """Also train a `student-scratch`: same steps, no teacher."""

    @model_validator(mode="after")
    def _no_vectors(self) -> Self:
        if self.loss.contrastive or getattr(self.model, "embedding", None):
            raise ValueError(
                "vectors are not distilled: leave loss.contrastive and model.embedding out; "
                "the model that was trained makes them (`mmlm embed --model RUN/model`)"
            )
        return self
