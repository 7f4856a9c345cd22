"""Encoders of transformers as stems: whole pictures and sounds go through them, and a linear map joins them to the trunk.

Shards hold patches and stacked mel frames of any size. Pictures are brought to the size that the encoder reads; where it
has more tokens than the shards have patches or stacks, the mean of neighbours is taken, so that a sequence is as long as
without it.

Axes: I picture or sound, C channel, T token of the encoder, E its width, D width of the trunk, P patch, M mel token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from mmlm.errors import ConfigError
from mmlm.features.spec import AudioSpec, ImageSpec
from mmlm.model.stem_config import AudioEncoderConfig, ImageEncoderConfig
from mmlm.model.stems import numbered, pictures_of

KINDS = ("vit", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit", "clip_vision_model", "siglip_vision_model",
         "whisper")  # fmt: skip
"""`model_type` of the encoders that are known."""
RANGE = 2.0
"""How far a stored log-mel of Whisper's scale reaches below its loudest value: 8 decades over 4."""
LOWEST = -1.5
"""The value of no sound at all."""


class Encoder(nn.Module):
    """What both have in common."""

    encoder: Any

    def recompute(self) -> None:
        """Keep only what each layer reads, and run it again in the backward pass."""
        self.encoder.gradient_checkpointing_enable({"use_reentrant": False})


class PictureEncoder(Encoder):
    """Patches (P, D) → what the encoder makes of their pictures, (P, width)."""

    def __init__(self, config: ImageEncoderConfig, spec: ImageSpec, width: int) -> None:
        super().__init__()
        self.config, self.spec = config, spec
        self.side = config.size // int(config.settings["patch_size"])
        self.encoder = empty_encoder(config.settings)
        self.out = nn.Linear(width_of(config.settings), width)

    def forward(self, rows_PD: torch.Tensor, at_P: torch.Tensor) -> torch.Tensor:
        x_IHWC, place_P = pictures_of(rows_PD, at_P, self.spec)
        x_ITE = self.encoder(pixel_values=self._pixels(x_IHWC)).last_hidden_state
        x_ITE = x_ITE[:, -(self.side**2) :]  # class and register tokens come first
        side = self.spec.size // self.spec.patch
        if side < self.side:
            grid_IEHW = x_ITE.transpose(1, 2).unflatten(2, (self.side, self.side))
            x_ITE = F.avg_pool2d(grid_IEHW, self.side // side).flatten(2).transpose(1, 2)
        return self.out(x_ITE.flatten(0, 1)[place_P])

    def _pixels(self, x_IHWC: torch.Tensor) -> torch.Tensor:
        """(I, C, H, W) as the encoder was trained to see them; in the shards' scale black is -2 and white 2."""
        channels = len(self.config.mean)
        x_ICHW = x_IHWC.permute(0, 3, 1, 2)
        if x_ICHW.shape[1] != channels:  # grey
            x_ICHW = x_ICHW.expand(-1, channels, -1, -1)
        if x_ICHW.shape[-1] != self.config.size:
            size = (self.config.size, self.config.size)
            x_ICHW = F.interpolate(x_ICHW.float(), size, mode="bicubic", antialias=True).to(x_ICHW.dtype)
        mean, deviation = (x_ICHW.new_tensor(v)[:, None, None] for v in (self.config.mean, self.config.deviation))
        return (((x_ICHW + 2) / 4 - mean) / deviation).contiguous()


class SoundEncoder(Encoder):
    """Stacked log-mel frames (M, D) → what the encoder makes of their sounds, (M, width)."""

    def __init__(self, config: AudioEncoderConfig, spec: AudioSpec, width: int) -> None:
        super().__init__()
        self.spec, self.frames = spec, 2 * int(config.settings["max_source_positions"])
        self.encoder = empty_encoder(config.settings)
        self.out = nn.Linear(width_of(config.settings), width)

    def forward(self, rows_MD: torch.Tensor, at_M: torch.Tensor) -> torch.Tensor:
        each, bins = self.spec.frames_per_token, self.spec.n_mels
        sound_M = numbered(at_M, None)
        sounds, tokens = int(sound_M[-1]) + 1, self.frames // each
        place_M = sound_M * tokens + at_M
        grid = rows_MD.new_full((sounds * tokens, each * bins), LOWEST).index_copy(0, place_M, rows_MD)
        x_ILC = grid.view(sounds, self.frames, bins)
        # what silence is beside a sound, as if zeros had stood behind it before its log-mel was taken
        floor_I11 = (x_ILC.detach().amax((1, 2), keepdim=True) - RANGE).clamp_min(LOWEST)
        x_ICL = torch.maximum(x_ILC, floor_I11).transpose(1, 2).contiguous()
        x_ITE = self.encoder(input_features=x_ICL).last_hidden_state
        x_IME = x_ITE.unflatten(1, (tokens, each // 2)).mean(2)
        return self.out(x_IME.flatten(0, 1)[place_M])


def empty_encoder(settings: dict[str, Any]) -> Any:
    """The encoder of a config.json, in torch's default dtype, its weights at random, without parts of which its last layer's
    tokens know nothing: those would never have a gradient. Raises ConfigError when transformers is missing."""
    try:
        from transformers import AutoConfig, AutoModel
        from transformers.models.whisper.modeling_whisper import WhisperEncoder
    except ImportError:
        raise ConfigError(
            "a pretrained stem needs transformers, which is not installed",
            cure="pip install 'mmlm-workflows[pretrained]'",
        ) from None
    kind = settings.get("model_type")
    if kind not in KINDS:
        raise ConfigError(f"a pretrained stem of type {kind!r}", wanted=f"one of {', '.join(KINDS)}")
    plain = {key: value for key, value in settings.items() if key not in ("model_type", "auto_map")}
    config: Any = AutoConfig.for_model(kind, **plain)
    if kind == "whisper":
        config._attn_implementation = "sdpa"
        encoder = WhisperEncoder(config)
        position: Any = encoder.embed_positions.weight
        position.fixed = True  # sinusoids, which no training changes
        return encoder
    made = {"dtype": torch.get_default_dtype(), "attn_implementation": "sdpa", "trust_remote_code": False}
    model = AutoModel.from_config(config, **made)
    for module in list(model.modules()):
        for name in ("pooler", "head", "mask_token"):
            if getattr(module, name, None) is not None:
                setattr(module, name, None)
        if hasattr(module, "use_head"):
            module.use_head = False
        if hasattr(module, "post_layernorm") and kind.startswith("clip"):  # of the pooled vector alone
            module.post_layernorm = nn.Identity()
    return model


def width_of(settings: dict[str, Any]) -> int:
    """Values of a token of the encoder."""
    return int(settings["d_model"] if settings["model_type"] == "whisper" else settings["hidden_size"])


def dimensions(config: ImageEncoderConfig | AudioEncoderConfig) -> tuple[int, int, int, int]:
    """Layers, tokens of one picture or sound, their values, and those of the feed-forward."""
    settings, E = config.settings, width_of(config.settings)
    if isinstance(config, AudioEncoderConfig):
        return settings["encoder_layers"], settings["max_source_positions"], E, settings["encoder_ffn_dim"]
    tokens = (config.size // settings["patch_size"]) ** 2
    if not settings["model_type"].startswith("siglip"):  # a class token, and registers
        tokens += 1 + (settings.get("num_register_tokens") or 0)
    return settings["num_hidden_layers"], tokens, E, settings.get("intermediate_size") or E * settings["mlp_ratio"]


def picture_flops(config: ImageEncoderConfig) -> tuple[int, int]:
    """Of one picture: of the map that reads its patches, and of all blocks behind, two for each multiplication."""
    layers, tokens, E, hidden = dimensions(config)
    if config.settings.get("use_swiglu_ffn"):  # DINOv2's, of which three maps are as large as two
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8 * 3 // 2
    elif config.settings.get("use_gated_mlp"):
        hidden = hidden * 3 // 2
    return 2 * config.size**2 * len(config.mean) * E, _blocks(layers, tokens, E, 2 * hidden)


def sound_flops(config: AudioEncoderConfig) -> tuple[int, int]:
    """Of one sound: of the convolution that reads its frames, and of all behind."""
    layers, tokens, E, hidden = dimensions(config)
    reading = 2 * 2 * tokens * 3 * int(config.settings["num_mel_bins"]) * E
    return reading, 2 * tokens * 3 * E * E + _blocks(layers, tokens, E, 2 * hidden)


def _blocks(layers: int, tokens: int, width: int, hidden: int) -> int:
    return layers * (8 * tokens * width**2 + 4 * tokens**2 * width + 2 * tokens * width * hidden)
