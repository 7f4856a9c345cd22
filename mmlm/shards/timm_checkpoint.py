"""Checkpoints of timm as encoders: the folder that `timm.models.push_to_hf_hub` and `save_for_hf` write.

`config.json` names the architecture and, under `pretrained_cfg`, how pictures were made for it (size, mean, deviation,
interpolation); weights are safetensors. Any network of timm that has `forward_features` can be read: those that give a
map instead of tokens (convolutional ones, Swin) give one token for each of its places, row by row.
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

from PIL import Image

from mmlm.errors import ConfigError

CURE = "pip install 'mmlm-workflows[timm]'; the versions of torch and torchvision must belong together"
_OPERATORS = {"nms": "dets, Tensor scores, float iou_threshold", "qnms": "dets, Tensor scores, float iou_threshold"}
"""What torchvision describes while it is imported, whether or not its compiled part could be loaded."""


class Given(NamedTuple):
    """What an encoder gives, named as transformers names it."""

    last_hidden_state: Any
    """(batch, tokens, dim)"""
    pooler_output: Any
    """(batch, dim of the pooled vector)"""


def is_timm(settings: dict[str, Any]) -> bool:
    """Whether a config.json is that of a timm checkpoint, saved by timm or by transformers around it."""
    model = settings.get("model_type")
    return model == "timm_wrapper" or (model is None and isinstance(settings.get("architecture"), str))


def preprocessor(settings: dict[str, Any]) -> dict[str, Any]:
    """How pictures are made for a timm checkpoint, in the terms of a preprocessor_config.json of transformers.

    Raises KeyError, TypeError or ValueError where config.json does not say it.
    """
    made = _pretrained(settings)
    channels, height, width = _input_size(settings)
    name = str(made.get("interpolation") or "bicubic").upper()
    resample = Image.Resampling["BICUBIC" if name == "RANDOM" else name]
    mean, deviation = tuple(made["mean"]), tuple(made["std"])
    if len(mean) != channels or len(deviation) != channels:
        raise ValueError(f"{len(mean)} means and {len(deviation)} deviations for {channels} channels")
    return {
        "size": {"height": height, "width": width}, "resample": int(resample), "image_mean": mean,
        "image_std": deviation, "num_channels": channels,
    }  # fmt: skip


def required_version() -> str:
    """The version of timm, part of a recipe. Raises ConfigError when it is not installed."""
    try:
        return version("timm")
    except PackageNotFoundError:
        raise ConfigError(
            "the encoder is a checkpoint of timm, which is not installed", wanted="timm and its torchvision", cure=CURE
        ) from None


def build(settings: dict[str, Any]) -> Any:
    """The network with random weights, on the default device: called with `pixel_values` (batch, channels, height,
    width) float32, it returns `Given`. Raises ConfigError without timm, and what timm raises for odd settings.
    """
    timm = _timm()
    network = timm.create_model(settings["architecture"], pretrained=False, **_arguments(settings))
    return _encoder(network)


def load(folder: str) -> Any:
    """The same with the weights of `folder`, all of them. Raises ConfigError without timm, RuntimeError when some lack."""
    return _encoder(_timm().create_model(f"local-dir:{folder}", pretrained=True))


def _encoder(network: Any) -> Any:
    import torch

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, pixel_values: torch.Tensor) -> Given:
            found = self.network.forward_features(pixel_values)
            pooled = self.network.forward_head(found, pre_logits=True)
            if found.dim() == 4:
                last = str(getattr(self.network, "output_fmt", "NCHW")).endswith("NHWC")
                found = found.flatten(1, 2) if last else found.flatten(2).transpose(1, 2)
            if found.dim() != 3 or pooled.dim() != 2:
                raise ValueError(f"gives features of the shapes {tuple(found.shape)} and {tuple(pooled.shape)}")
            return Given(found, pooled)

    return Encoder()


def _pretrained(settings: dict[str, Any]) -> dict[str, Any]:
    """The part on how it was trained: early versions of timm wrote it beside the architecture."""
    made = settings.get("pretrained_cfg", settings)
    if not isinstance(made, dict):
        raise TypeError(f"pretrained_cfg is {made!r}")
    return made


def _arguments(settings: dict[str, Any]) -> dict[str, Any]:
    return {"num_classes": settings.get("num_classes"), **(settings.get("model_args") or {})}


def _input_size(settings: dict[str, Any]) -> tuple[int, int, int]:
    arguments = settings.get("model_args") or {}
    channels, height, width = map(int, _pretrained(settings)["input_size"])
    channels = int(arguments.get("in_chans") or channels)
    if (size := arguments.get("img_size")) is not None:
        height, width = map(int, (size, size) if isinstance(size, int) else size)
    return channels, height, width


def _timm() -> Any:
    """The library. Raises ConfigError where it, or the torchvision that it needs, cannot be imported."""
    required_version()
    try:
        try:
            import timm
        except RuntimeError as error:
            if "operator torchvision::" not in str(error):
                raise
            _describe_operators()
            import timm
    except Exception as error:  # a torchvision made for another torch raises what it likes
        first = str(error).strip().split("\n", 1)[0][:200]
        raise ConfigError(
            f"timm cannot be imported ({type(error).__name__}: {first})", wanted="timm and its torchvision", cure=CURE
        ) from None
    return timm


def _describe_operators() -> None:
    """Tell torch of the operators that torchvision has in its compiled part, where that part was made for another torch.

    PyPI's torchvision is made for CUDA; beside a torch for the CPU its Python alone can be used, which is all that a
    network of timm needs. The operators themselves (of object detection) stay absent.
    """
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for name, arguments in _OPERATORS.items():
        library.define(f"{name}(Tensor {arguments}) -> Tensor")
    _KEPT.append(library)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("timm", "torchvision")]:
        del sys.modules[name]


_KEPT: list[Any] = []
"""A library of operators is forgotten by torch when nothing holds it."""
