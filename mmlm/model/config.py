"""Settings of the fused Transformer. Sizes of the inputs come from the FeatureSpec, never from here."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from mmlm.config import Config
from mmlm.model.fusion_config import ConcatConfig, FusionConfig
from mmlm.model.initialisation_config import DepthConfig, InitialisationConfig
from mmlm.model.presets import PRESETS, sizes


class ModelConfig(Config):
    kind: Literal["transformer"] = "transformer"
    """This model among the others (`mmlm/model/baseline_config.py`)."""
    preset: Literal["tiny", "mini", "small", "base", "350m", "760m", "1b", "3b", "7b", "vaswani", "bert"] = "tiny"
    """Sizes by name (`mmlm plan STORY --presets` shows them); what is given beside it overrides it."""
    layout: Literal["decoder", "encoder", "encoder_decoder"] = "decoder"
    """`encoder` answers by class only and reads the whole question in both directions; `encoder_decoder` reads the question
    with one stack of blocks and writes the answer with another."""
    width: int = Field(128, ge=8)
    """Size of the residual stream, d."""
    layers: int = Field(2, ge=1)
    encoder_layers: int | None = Field(None, ge=1)
    """Blocks of the encoder of layout encoder_decoder; default as many as `layers`, those of the decoder."""
    heads: int = Field(4, ge=1)
    """Attention heads; `width` is a multiple of them."""
    kv_heads: int | None = 2
    """Key-value heads, each shared by `heads` / `kv_heads` query heads (Ainslie et al. 2023); fewer make the cache of
    generation and the key and value maps smaller. Default half of `heads`, all where that is no whole number; null is
    one for each."""
    qk_norm: bool = True
    """Normalise queries and keys per head: keeps attention scores small at high learning rates (Dehghani et al. 2023)."""
    mlp: Literal["swiglu", "relu", "gelu"] = "swiglu"
    """Feed-forward: gated (Shazeer 2020), or the classic max(0, x W + b) W + b, or that with GELU for the maximum."""
    mlp_width: int | None = None
    """Hidden size of the feed-forward; default 8/3 of the width, rounded up to a multiple of 16, if gated, else four
    times the width."""
    norm: Literal["rms", "layer"] = "rms"
    """RMSNorm (Zhang & Sennrich 2019) or LayerNorm (Ba et al. 2016)."""
    norm_at: Literal["before", "after"] = "before"
    """Whether what a sub-layer reads is normalised, or its sum with the residual stream (Vaswani et al. 2017)."""
    positions: Literal["rotary", "learned", "sinusoidal"] = "rotary"
    """Queries and keys are rotated, or a learned or a sinusoidal vector for each position is added to the embeddings."""
    image_stem: Literal["linear", "conv"] = "linear"
    """How a patch becomes a token: by one linear map (ViT), or by strided 3 x 3 convolutions over the picture (Xiao et al.
    2021), which needs patches of 2, 4, 8, 16 … pixels."""
    image_places: Literal["table", "grid"] = "table"
    """A learned vector for each place of a patch, or one for its row, one for its column, and a wave for the number of the
    picture in its record, the time of a video's frame."""
    audio_stem: Literal["linear", "conv"] = "linear"
    """How mel frames become a token: by one linear map, or by the two convolutions of Whisper (Radford et al. 2022)."""
    embedding: int | None = Field(None, ge=2)
    """Size of the vector that a record becomes, for finding what means the same (`train.loss.contrastive`); none: no such
    head."""
    fusion: FusionConfig = ConcatConfig()
    """How modalities meet; the word alone (`fusion: add`) is that kind with its defaults."""
    attention: Literal["causal", "prefix"] = "causal"
    """`prefix` lets the tokens of the question and its media see each other in both directions."""
    initialisation: InitialisationConfig = DepthConfig()
    """How weights are drawn; `mup` lets a learning rate found at a small width serve at any other."""
    rope_theta: float = 10000.0
    """Base of the rotary position frequencies (Su et al. 2021)."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the residual updates that is dropped while training."""

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, given: Any) -> Any:
        """What a preset says, and what the default of `kv_heads` is, which depends on `heads`."""
        if not isinstance(given, dict) or given.get("preset", "tiny") not in PRESETS:
            return given
        made = sizes(given.get("preset", "tiny"), given)
        heads = made["heads"]
        if isinstance(heads, int) and "kv_heads" not in made:
            made["kv_heads"] = heads if heads % 2 else heads // 2
        return made

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.width % self.heads or (self.positions == "rotary" and (self.width // self.heads) % 2):
            even = "an even" if self.positions == "rotary" else "a"
            raise ValueError(f"width {self.width} must be {even} multiple of heads {self.heads}")
        if self.encoder_layers is not None and self.layout != "encoder_decoder":
            raise ValueError("encoder_layers is a setting of layout encoder_decoder")
        if self.layout != "decoder" and self.fusion.kind != "concat":
            raise ValueError(f"layout {self.layout} joins modalities by fusion concat only, not by {self.fusion.kind}")
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
        """Hidden size of the feed-forward."""
        gated = -(-self.width * 8 // 3 // 16) * 16
        return self.mlp_width or (gated if self.mlp == "swiglu" else 4 * self.width)
