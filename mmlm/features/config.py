"""Settings of the features: what a picture, a sound and a text become."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mmlm.config import Config
from mmlm.features.spec import AudioSpec, ImageSpec, VideoSpec


class TokenizerConfig(Config):
    """A byte-level BPE tokenizer, trained on the training split and then kept; or one that is given."""

    vocab_size: int = 512
    """Wanted size, special tokens and the 256 bytes included."""
    file: str | None = None
    """Path of a Hugging Face `tokenizer.json` to use instead of training one."""
    keep: bool = True
    """Whether the tokenizer of this story's last shard set is kept when data were added, so that only they are sharded."""
    max_bytes: int = Field(64 << 20, ge=1)
    """Text read for training, bytes. Where the training split has more, records are drawn by a hash of their ids, evenly
    over all of it."""


class EncoderConfig(Config):
    """A pretrained encoder, whose features of a picture or sound are stored beside it."""

    folder: str
    """A checkpoint folder of transformers on local disk: config.json and safetensors; for pictures (ViT, DeiT, DINO,
    CLIP, SigLIP) preprocessor_config.json too, or a folder as timm writes it; for sounds Whisper. Its content counts,
    not where it lies."""
    layer: Literal["last", "pooled"] = "last"
    """`last`: a vector for each token of the last layer; `pooled`: one for the whole, of a sound the mean of its tokens."""
    read: bool = False
    """Whether models read the features, through a linear projector, in place of the patches or mel frames."""
    batch: int = Field(default=16, ge=1, le=4096)
    """Items encoded together. Part of the recipe, since another one may change the last bits."""


class FeaturesConfig(Config):
    """What every record is turned into."""

    tokenizer: TokenizerConfig = TokenizerConfig()
    max_len: int = Field(256, ge=3)
    """Longest record, tokens and opened media slots together."""
    on_long: Literal["refuse", "keep"] = "refuse"
    """Records that are longer: to quarantine as `too_long`; or kept, if they are text alone, for a pack plan to split
    (`data.pack`). In the other splits only the answer may go beyond."""
    image: ImageSpec | None = None
    """Absent: the corpus has no pictures, or they are left out."""
    audio: AudioSpec | None = None
    """Absent: the corpus has no sounds, or they are left out."""
    video: VideoSpec | None = VideoSpec()
    """How videos become pictures and a sound, in a corpus that has any; null: they go to quarantine as `unsupported`."""
    chat_template: Literal["plain", "chatml", "tokenizer"] = "plain"
    """How the turns before an answer are laid out: one below the other; with ChatML's marks; or by the template that lies
    beside `tokenizer.file` (`chat_template.jinja`, or in `tokenizer_config.json`). What was said before the
    last question may be taken away as context is; `plain` marks it as such."""
    encoders: dict[Literal["image", "audio"], EncoderConfig] = {}
    """Pretrained encoders, by the kind of media they read; they need the extra `encoders` (transformers)."""
    fields: bool = True
    """Whether named numbers and categories are used where records have them."""
