"""Trainings of adapters on a pretrained trunk, and adapters at rest.

    adapters/NAME/adapter.safetensors   A and B of every adapted map, and the parts that were trained as they are
    adapters/NAME/adapter_config.json   as peft writes it; `base_model_name_or_path` holds the digest of the base

lie beside the `model.safetensors` of a model whose adapter is not merged.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from mmlm.errors import ArtifactError, MmlmError
from mmlm.features.spec import FeatureSpec
from mmlm.model import adapters
from mmlm.model.baseline_config import AnyModelConfig
from mmlm.model.config import LoraConfig
from mmlm.model.transformer import FusedTransformer
from mmlm.storage import write_json
from mmlm.train import pretrained, weights
from mmlm.train.config import TrainConfig

FOLDER = "adapters"
TENSORS, SETTINGS = "adapter.safetensors", "adapter_config.json"


def build(config: TrainConfig, spec: FeatureSpec, shards: Path) -> FusedTransformer:
    """The model that is trained: with an adapter and a base that stays, where the config has `lora`."""
    model = pretrained.build(config.model, spec, shards)
    if config.lora:
        adapters.add(model, config.lora)
        adapters.freeze_base(model, config.lora)
    return model


def base_of(config: Any) -> dict[str, str]:
    """What a training's checkpoints name beside the digests of its data: the base that they need. {} without one."""
    lora = getattr(config, "lora", None)
    return {"base": config.model.pretrained.digest} if lora else {}


def save_model(
    out: Path,
    tensors: dict[str, torch.Tensor],
    config: TrainConfig,
    model: AnyModelConfig,
    spec: FeatureSpec,
    shards: Path,
) -> None:
    """Write a finished model, of which `tensors` holds what was trained. Without `lora` that is all of it; else the base
    is made again as it was at the beginning, and the adapter merged into it or laid beside it."""
    lora = getattr(config, "lora", None)
    if lora is None:
        return weights.save_model(out, tensors, model, shards)
    torch.manual_seed(config.seed)
    whole = build(config, spec, shards)
    missing = whole.load_state_dict(tensors, strict=False)
    assert not missing.unexpected_keys, missing.unexpected_keys
    if lora.merged:
        adapters.merge(whole)
        return weights.save_model(out, whole.state_dict(), model, shards)
    state = whole.state_dict()
    weights.save_model(out, adapters.base_names(state), model, shards)
    folder = out / FOLDER / adapters.DEFAULT
    folder.mkdir(parents=True, exist_ok=True)
    parts = {name: state[name] for name in tensors if not adapters.is_adapter(name)}
    weights.write_tensors({**adapters.own_names(state), **parts}, folder / TENSORS)
    settings = {
        "peft_type": "LORA", "base_model_name_or_path": f"sha256:{_digest(model)}", "r": lora.rank,
        "lora_alpha": lora.alpha, "lora_dropout": lora.dropout, "bias": "none", "inference_mode": True,
        "target_modules": adapters.adapted_maps(whole),
    }  # fmt: skip
    write_json(folder / SETTINGS, settings)
    return None


def files(folder: Path) -> list[str]:
    """The files of a model's adapters, relative to its folder, sorted; [] where it has none."""
    return sorted(str(p.relative_to(folder)) for p in (folder / FOLDER).glob("*/*") if p.name in (TENSORS, SETTINGS))


def load_all(model: FusedTransformer, folder: Path) -> None:
    """Put the adapters in a model's folder on `model`; `default`, or the first of them, is the active one."""
    found = sorted({Path(name).parent.name for name in files(folder)})
    for name in found:
        load(model, folder / FOLDER / name, name)
    if found:
        adapters.switch(model, adapters.DEFAULT if adapters.DEFAULT in found else found[0])


def load(model: FusedTransformer, folder: Path, name: str) -> None:
    """Put the adapter in `folder` on `model` as `name`, active. Raises ArtifactError when it is none, or one for another
    base."""
    try:
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        base, targets = settings["base_model_name_or_path"], [str(t) for t in settings["target_modules"]]
        lora = LoraConfig(rank=settings["r"], alpha=settings["lora_alpha"], dropout=settings["lora_dropout"])
        tensors = load_file(folder / TENSORS)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ArtifactError(
            f"{folder} holds no adapter that can be read ({error})", wanted=f"{SETTINGS} and {TENSORS}",
            cure="train it again, or check the path",
        ) from None  # fmt: skip
    if base != f"sha256:{_digest(model.config)}":
        raise ArtifactError(
            f"the adapter in {folder} is for the base {base[7:19]}", wanted=_digest(model.config)[:12] or "no base",
            cure="use the adapter with the model that it was trained on",
        )  # fmt: skip
    if unknown := set(targets) - set(adapters.adapted_maps(model, all_maps=True)):
        raise ArtifactError(f"the adapter in {folder} adapts {sorted(unknown)[0]}", wanted="linear maps of this model")
    try:
        adapters.add(model, lora, name, targets)
        adapters.load(model, tensors, name)
    except MmlmError as error:
        raise ArtifactError(f"{folder}: {error.found}", wanted=error.wanted, cure=error.cure) from None


def _digest(config: AnyModelConfig) -> str:
    found = getattr(config, "pretrained", None)
    return found.digest if found else ""
