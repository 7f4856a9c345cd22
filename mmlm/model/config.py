"""Settings of the fused Transformer. Sizes of the inputs come from the FeatureSpec, never from here."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from mmlm.config import Config
from mmlm.model.fusion_config import ConcatConfig, FusionConfig
from mmlm.model.initialisation_config import DepthConfig, InitialisationConfig
from mmlm.model.presets import PRESETS, sizes
from mmlm.model.stem_config import AudioEncoderConfig, ImageEncoderConfig


class LinearScaling(Config):
    """Every rotary frequency divided by `factor`: positions are squeezed together (Chen et al. 2023)."""

    kind: Literal["linear"] = "linear"
    factor: float = Field(ge=1)


class Llama3Scaling(Config):
    """Only the slow frequencies divided by `factor` (Llama 3.1, Dubey et al. 2024)."""

    kind: Literal["llama3"] = "llama3"
    factor: float = Field(ge=1)
    low_turns: float = Field(1.0, gt=0)
    """What turns less often in `trained_length` is divided by the whole factor."""
    high_turns: float = Field(4.0, gt=0)
    """What turns more often stays."""
    trained_length: int = Field(8192, ge=1)
    """Positions of the records that the unstretched model was trained on."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.high_turns <= self.low_turns:
            raise ValueError(f"high_turns {self.high_turns} must be above low_turns {self.low_turns}")
        return self


class YarnScaling(Config):
    """YaRN (Peng et al. 2023): slow frequencies divided by `factor`, and the attention made sharper."""

    kind: Literal["yarn"] = "yarn"
    factor: float = Field(ge=1)
    trained_length: int = Field(ge=1)
    """Positions of the records that the unstretched model was trained on."""
    fast_turns: float = Field(32.0, gt=0)
    """What turns more often in `trained_length` stays."""
    slow_turns: float = Field(1.0, gt=0)
    """What turns less often is divided by the whole factor."""
    magnitude: float | None = None
    """Of rotated queries and keys; default 0.1 ln(factor) + 1."""
    whole_pairs: bool = True
    """The borders between fast and slow are rounded to whole pairs of values."""


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling


class EncoderSettings(Config):
    """What is known of a BERT-style encoder; read off its folder."""

    settings: dict[str, Any]
    """Its config.json."""
    begin: int
    """Id of the token that every text begins with."""
    end: int
    padding: int


class PretrainedConfig(Config):
    """A trunk that was trained elsewhere: its shape, its weights and the rows of its vocabulary are taken over."""

    folder: str = ""
    """A causal language model as transformers writes it (Llama, Mistral, Qwen2, Qwen3), or an encoder (BERT, RoBERTa) for
    stories whose tasks have classes or numbers: config.json, tokenizer.json and safetensors. Its content counts, not where
    it lies: in a finished model only `digest` is left."""
    digest: str = ""
    """sha256 of its files; given, another content is refused."""
    encoder: EncoderSettings | None = None
    """Filled in where it is an encoder."""


class LoraConfig(Config):
    """LoRA (Hu et al. 2022): W + (alpha / rank) B A in place of W, and only B and A are trained."""

    rank: int = Field(8, ge=1)
    """Rows of A."""
    alpha: float = Field(16.0, gt=0)
    """What comes from B A is multiplied by `alpha` / `rank`."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of what A reads that is dropped while training."""
    targets: tuple[str, ...] = ("blocks",)
    """Modules (or patterns) below which every linear map has an adapter; `answer` is the head over the vocabulary."""
    also: tuple[str, ...] | None = None
    """Modules or patterns that are trained as they are; default all that the pretrained trunk does not have: media, fields
    and the class head."""
    merged: bool = False
    """The finished model has W + (alpha / rank) B A; otherwise both, so that a request may leave the adapter out."""


class ModelConfig(Config):
    added: ClassVar[tuple[str, ...]] = ("image_encoder", "audio_encoder")
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
    """Attention heads; `width` is a multiple of them, unless `head_size` is given."""
    kv_heads: int | None = 2
    """Key-value heads, each shared by `heads` / `kv_heads` query heads (Ainslie et al. 2023); fewer make the cache of
    generation and the key and value maps smaller. Default half of `heads`, all where that is no whole number; null is
    one for each."""
    head_size: int | None = Field(None, ge=2)
    """Width of a head; default `width` / `heads`."""
    attention_bias: Literal["none", "qkv", "all"] = "none"
    """Biases of the maps of attention: none, of queries, keys and values (Qwen2), or of what is put out as well."""
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
    image_stem: Literal["linear", "conv", "hog"] = "linear"
    """How a patch becomes a token: by one linear map (ViT); by strided 3 x 3 convolutions over the picture (Xiao et al.
    2021), which needs patches of 2, 4, 8, 16 … pixels; or from histograms of its edges' orientations and of its colours
    (Dalal & Triggs 2005), of which only a linear map is learnt: for some hundred to some thousand pictures."""
    image_places: Literal["table", "grid"] = "table"
    """A learned vector for each place of a patch, or one for its row, one for its column, and a wave for the number of the
    picture in its record, the time of a video's frame."""
    audio_stem: Literal["linear", "conv"] = "linear"
    """How mel frames become a token: by one linear map, or by the two convolutions of Whisper (Radford et al. 2022)."""
    image_encoder: ImageEncoderConfig | None = None
    """A pretrained encoder in place of `image_stem`."""
    audio_encoder: AudioEncoderConfig | None = None
    """A pretrained encoder in place of `audio_stem`."""
    embedding: int | None = Field(None, ge=2)
    """Size of the vector that a record becomes, for finding what means the same (`train.loss.contrastive`); none: no such
    head."""
    fusion: FusionConfig = ConcatConfig()
    """How modalities meet in what is read (of layout encoder_decoder by its encoder); the word alone (`fusion: add`) is that kind
    with its defaults."""
    attention: Literal["causal", "prefix"] = "causal"
    """`prefix` lets the tokens of the question and its media see each other in both directions."""
    initialisation: InitialisationConfig = DepthConfig()
    """How weights are drawn; `mup` lets a learning rate found at a small width serve at any other."""
    rope_theta: float = 10000.0
    """Base of the rotary position frequencies (Su et al. 2021)."""
    rope_scaling: Annotated[RopeScaling, Field(discriminator="kind")] | None = None
    """Frequencies stretched so that the model reaches further than it was trained."""
    norm_epsilon: float = Field(1e-6, gt=0)
    """Added to the mean square before its root is taken."""
    tied: bool = False
    """The head over the vocabulary is the embedding of the tokens (Press & Wolf 2017)."""
    pretrained: PretrainedConfig | None = None
    """Where the trunk comes from; the fields of its shape need not be said then, and may not be said otherwise."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the residual updates that is dropped while training."""

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, given: Any) -> Any:
        """What a preset says, and what the default of `kv_heads` is, which depends on `heads`."""
        if not isinstance(given, dict) or given.get("preset", "tiny") not in PRESETS:
            return given
        if given.get("pretrained"):  # whose shape it is that counts
            return given
        made = sizes(given.get("preset", "tiny"), given)
        heads = made["heads"]
        if isinstance(heads, int) and "kv_heads" not in made:
            made["kv_heads"] = heads if heads % 2 else heads // 2
        return made

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        rotary = self.positions == "rotary"
        if rotary and self.head_size is not None and self.head_size % 2:
            raise ValueError(f"head_size {self.head_size} must be even: values turn in pairs")
        if self.head_size is None and (self.width % self.heads or (rotary and (self.width // self.heads) % 2)):
            raise ValueError(
                f"width {self.width} must be {'an even' if rotary else 'a'} multiple of heads {self.heads}"
            )
        if self.encoder_layers is not None and self.layout != "encoder_decoder":
            raise ValueError("encoder_layers is a setting of layout encoder_decoder")
        if self.fusion.kind == "late" and self.tied:
            raise ValueError(
                "tied needs heads as wide as the embedding of the tokens; those of fusion late read every expert"
            )
        if self.fusion.kind == "late" and self.pretrained:
            raise ValueError(
                "fusion late has a trunk for each modality, and model.pretrained brings one: give another fusion"
            )
        if self.tied and self.initialisation.kind == "mup":
            raise ValueError("tied has one matrix for two ends that learn at different rates under initialisation mup")
        for kind, stem, encoder in (
            ("image", self.image_stem, self.image_encoder), ("audio", self.audio_stem, self.audio_encoder),
        ):  # fmt: skip
            if encoder and stem != "linear":
                raise ValueError(f"{kind}_stem {stem} and {kind}_encoder: give one of them")
        if self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
            raise ValueError(f"heads {self.heads} must be a multiple of kv_heads {self.kv_heads}")
        return self

    @property
    def brings_weights(self) -> bool:
        """Whether a part of it was trained elsewhere."""
        return bool(self.pretrained or self.image_encoder or self.audio_encoder)

    @property
    def reading_layers(self) -> int:
        """Blocks in which modalities meet; of each expert, with fusion late."""
        return self.encoder_layers or self.layers

    @property
    def head_width(self) -> int:
        return self.head_size or self.width // self.heads

    @property
    def key_value_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def feed_forward(self) -> int:
        """Hidden size of the feed-forward."""
        gated = -(-self.width * 8 // 3 // 16) * 16
        return self.mlp_width or (gated if self.mlp == "swiglu" else 4 * self.width)
