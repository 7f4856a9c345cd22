"""Settings of training. One loop serves training and distillation; what changes is the objective."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mmlm.config import Config
from mmlm.data.config import DataConfig
from mmlm.model.config import ModelConfig


class OptimizerConfig(Config):
    """AdamW (Loshchilov & Hutter 2019). Weight decay applies to matrices only, never to norms, biases, embeddings."""

    kind: Literal["adamw"] = "adamw"
    lr: float = Field(3e-3, gt=0)
    """Peak learning rate."""
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    weight_decay: float = Field(0.1, ge=0)
    clip: float = Field(1.0, ge=0)
    """Largest gradient norm; 0 turns clipping off."""


class ScheduleConfig(Config):
    """Linear warm-up, then a cosine down to `floor`."""

    kind: Literal["cosine"] = "cosine"
    warmup: float = Field(0.05, ge=0, lt=1)
    """Share of the steps in which the rate rises."""
    floor: float = Field(0.02, ge=0, le=1)
    """Share of the peak rate at the last step."""


class ZeroConfig(Config):
    stage: Literal[1, 2, 3] = 2
    """What is spread over the ranks: 1 optimizer states, 2 and gradients, 3 and parameters (Rajbhandari et al. 2020)."""


class LossConfig(Config):
    """Weights of the terms that are added up."""

    answer: float = Field(1.0, ge=0)
    """Cross-entropy of the answer's tokens, per token."""
    label: float = Field(1.0, ge=0)
    """Cross-entropy of the class head, per labelled record."""


class LoopConfig(Config):
    """What every objective shares."""

    steps: int = Field(1500, ge=1)
    """Optimizer steps."""
    seed: int = Field(0, ge=0)
    """Of initialisation, order, dropout of modalities and augmentation."""
    precision: Literal["bf16", "fp32"] = "bf16"
    accumulate: int = Field(1, ge=1)
    """Micro-batches into which each rank's share of a step is cut; more take less memory, the loss stays the same."""
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    zero: ZeroConfig = ZeroConfig()
    loss: LossConfig = LossConfig()
    save_every: int = Field(250, ge=1)
    """Steps between checkpoints to resume from."""
    keep: int = Field(2, ge=1)
    """Checkpoints kept while training."""
    log_every: int = Field(10, ge=1)
    """Steps between rows of `metrics.jsonl`."""


class TrainConfig(LoopConfig):
    model: ModelConfig = ModelConfig()
