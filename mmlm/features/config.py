"""Settings of the features: what a picture, a sound and a text become."""

from __future__ import annotations

from mmlm.config import Config
from mmlm.features.spec import AudioSpec, ImageSpec


class TokenizerConfig(Config):
    """A byte-level BPE tokenizer, trained on the training split and then kept; or one that is given."""

    vocab_size: int = 512
    """Wanted size, special tokens and the 256 bytes included."""
    file: str | None = None
    """Path of a Hugging Face `tokenizer.json` to use instead of training one."""
    keep: bool = True
    """Whether the tokenizer of this story's last shard set is kept when data were added, so that only they are sharded."""
    max_bytes: int = 64 << 20
    """Text read for training, bytes; the first of it in order of id."""


class FeaturesConfig(Config):
    """What every record is turned into."""

    tokenizer: TokenizerConfig = TokenizerConfig()
    max_len: int = 256
    """Longest sequence, tokens and opened media slots together; longer records go to quarantine as `too_long`."""
    image: ImageSpec | None = None
    """Absent: the corpus has no pictures, or they are left out."""
    audio: AudioSpec | None = None
    """Absent: the corpus has no sounds, or they are left out."""
    fields: bool = True
    """Whether named numbers and categories are used where records have them."""
