"""Settings of the fused Transformer. Sizes of the inputs come from the FeatureSpec, never from here."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from mmlm.config import Config


class ModelConfig(Config):
    width: int = Field(128, ge=8)
    """Size of the residual stream, d."""
    layers: int = Field(2, ge=1)
    heads: int = Field(4, ge=1)
    """Attention heads; `width` is a multiple of them."""
    kv_heads: int | None = None
    """Key-value heads, each shared by `heads` / `kv_heads` query heads (Ainslie et al. 2023); default one for each.
    Fewer make the cache of generation and the key and value maps smaller."""
    qk_norm: bool = False
    """Normalise queries and keys per head: keeps attention scores small at high learning rates (Dehghani et al. 2023)."""
    mlp_width: int | None = None
    """Hidden size of the gated feed-forward; default 8/3 of the width, rounded up to a multiple of 16."""
    fusion: Literal["concat"] = "concat"
    """How modalities meet: `concat` puts their tokens into one sequence."""
    attention: Literal["causal", "prefix"] = "causal"
    """`prefix` lets the tokens of the question and its media see each other in both directions."""
    rope_theta: float = 10000.0
    """Base of the rotary position frequencies (Su et al. 2021)."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the residual updates that is dropped while training."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(f"width {self.width} must be an even multiple of heads {self.heads}")
        if self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
            raise ValueError(f"heads {self.heads} must be a multiple of kv_heads {self.kv_heads}")
        return self

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def key_value_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def feed_forward(self) -> int:
        return self.mlp_width or -(-self.width * 8 // 3 // 16) * 16
