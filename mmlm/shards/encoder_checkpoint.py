"""A pretrained encoder's checkpoint: what its settings say, how it reads what is stored, and the encoder with its weights."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mmlm.errors import ConfigError
from mmlm.features.config import EncoderConfig
from mmlm.features.spec import AudioSpec, ImageSpec
from mmlm.shards import timm_checkpoint
from mmlm.shards.encoder_files import folder_of, read_json
from mmlm.shards.encoder_inputs import Pictures, Sounds

IMAGE_MODELS = ("clip", "clip_vision_model", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit", "siglip",
                "siglip_vision_model", "vit")  # fmt: skip
"""`model_type` of the checkpoints that read square pictures of one size."""
AUDIO_MODELS = ("whisper",)


def settings_of(config: EncoderConfig, stored: ImageSpec | AudioSpec) -> tuple[dict[str, Any], Pictures | Sounds]:
    """What a checkpoint says of its encoder, and how that reads what is stored. Raises ConfigError when it cannot."""
    reader = reader_of(config, stored)
    if isinstance(reader, Pictures) and reader.timm:
        return reader.timm, reader
    return _settings(config).to_dict(), reader


def weights_of(config: EncoderConfig, stored: ImageSpec | AudioSpec) -> Any:
    """The encoder of a checkpoint of transformers with its weights, float32. Raises ConfigError when some lack."""
    return _from_transformers(config, reader_of(config, stored))


def reader_of(config: EncoderConfig, stored: ImageSpec | AudioSpec) -> Pictures | Sounds:
    settings = _config(config)
    kind, models = ("audio", AUDIO_MODELS) if isinstance(stored, AudioSpec) else ("image", IMAGE_MODELS)
    model = settings.get("model_type")
    if model not in models and not (kind == "image" and timm_checkpoint.is_timm(settings)):
        raise ConfigError(
            f"{config.folder} holds a model of type {model!r}",
            wanted=f"one of {', '.join(models)} for "
            + ("pictures, or a checkpoint of timm" if kind == "image" else "sounds"),
        )
    if "quantization_config" in settings or (Path(config.folder) / "adapter_config.json").exists():
        raise ConfigError(f"{config.folder} is quantised or an adapter", wanted="plain weights in one folder")
    try:
        if isinstance(stored, AudioSpec):
            return Sounds(config, stored, settings)
        return Pictures(config, stored, settings)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"config.json of {config.folder} cannot be used ({error})") from None


def library_of(config: EncoderConfig) -> str:
    """The package that wrote a checkpoint, and builds it: timm or transformers."""
    return "timm" if timm_checkpoint.is_timm(_config(config)) else "transformers"


def _config(config: EncoderConfig) -> dict[str, Any]:
    return read_json(config, "config.json") or {}


def version_of(name: str) -> str:
    """Of a library that computes features. Raises ConfigError when it is not installed."""
    if name == "timm":
        return timm_checkpoint.required_version()
    try:
        return version(name)
    except PackageNotFoundError:
        raise ConfigError(
            "a pretrained encoder needs transformers, which is not installed",
            cure="pip install 'mmlm-workflows[encoders]'",
        ) from None


def _transformers() -> Any:
    """The library, quiet. Raises ConfigError when it is not installed."""
    version_of("transformers")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _settings(config: EncoderConfig) -> Any:
    """The checkpoint's own settings; of a pair of encoders those of its vision part. Raises ConfigError."""
    folder = folder_of(config)
    try:
        found = _transformers().AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except ConfigError:
        raise
    except Exception as error:  # whatever a strange config.json makes transformers raise
        raise _unusable(config, error) from None
    return getattr(found, "vision_config", found)


def shape_of(config: EncoderConfig, reader: Pictures | Sounds) -> tuple[int, int]:
    """(dim, tokens) of the chosen layer, without reading weights: by a pass in which nothing is computed. Raises ConfigError
    when the checkpoint does not take what `reader` gives it."""
    import torch

    timm = reader.timm if isinstance(reader, Pictures) else None
    settings = None if timm else _settings(config)
    try:
        with torch.device("meta"), torch.inference_mode():
            if timm:
                model = timm_checkpoint.build(timm).eval()
            else:
                library = _transformers()
                # float32 as the weights will be read: else whatever type the checkpoint was saved in
                made = {"dtype": torch.float32, "attn_implementation": "sdpa", "trust_remote_code": False}
                model = _part(library.AutoModel.from_config(settings, **made))
            given = model(**{reader.argument: torch.zeros(reader.empty())})
        chosen = given.last_hidden_state
        if config.layer == "pooled" and isinstance(reader, Pictures):
            chosen = given.pooler_output[:, None]
    except ConfigError:
        raise
    except Exception as error:  # sizes that do not fit raise what torch likes
        raise _unusable(config, error) from None
    return int(chosen.shape[2]), int(chosen.shape[1])


def load_model(config: EncoderConfig, reader: Pictures | Sounds) -> Any:
    """The encoder with its weights, on the GPU if there is one. Raises ConfigError when weights lack or do not fit."""
    import torch

    found = _from_timm(config) if isinstance(reader, Pictures) and reader.timm else _from_transformers(config, reader)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return found.eval().requires_grad_(False).to(device)


def _from_timm(config: EncoderConfig) -> Any:
    try:
        return timm_checkpoint.load(folder_of(config)).float()
    except ConfigError:
        raise
    except Exception as error:
        raise _unusable(config, error) from None


def _from_transformers(config: EncoderConfig, reader: Pictures | Sounds) -> Any:
    import torch

    settings = _settings(config)
    try:
        model, report = _transformers().AutoModel.from_pretrained(
            folder_of(config), config=settings, local_files_only=True, trust_remote_code=False, use_safetensors=True,
            dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
    except Exception as error:
        raise _unusable(config, error) from None
    unused = "decoder." if isinstance(reader, Sounds) else "pooler." if config.layer == "last" else "-"
    if report["mismatched_keys"]:
        name, found, wanted = min(report["mismatched_keys"])
        raise ConfigError(
            f"{name} in {config.folder} has the shape {list(found)}", wanted=f"{list(wanted)}, as its config.json says",
            cure="take config.json and the weights from one checkpoint",
        )  # fmt: skip
    missing = sorted(name for name in report["missing_keys"] if not name.startswith(unused))
    if missing:
        raise ConfigError(
            f"the weights in {config.folder} lack {len(missing)} of the model's tensors, such as {missing[0]}",
            wanted="all of them: those that lack would be random",
            cure="choose `layer: last`" if all("pooler" in name for name in missing) else "use another checkpoint",
        )
    return _part(model)


def _part(model: Any) -> Any:
    """Of a model with an encoder and a decoder, the encoder."""
    return model.get_encoder() if model.config.model_type in AUDIO_MODELS else model


def _unusable(config: EncoderConfig, error: Exception) -> ConfigError:
    lines = str(error).strip().split("\n")
    first = " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])[:300]
    return ConfigError(
        f"the checkpoint in {config.folder} cannot be used ({type(error).__name__}: {first})",
        cure="use another checkpoint",
    )
