"""A model at rest: `model.safetensors` + `config.json` beside the feature spec and the tokenizer of its shards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes

from mmlm.config import parse
from mmlm.data.collate import field_rows
from mmlm.errors import ArtifactError
from mmlm.features import spec as feature_spec
from mmlm.features.spec import FeatureSpec
from mmlm.model.config import ModelConfig
from mmlm.model.transformer import FusedTransformer
from mmlm.storage import atomic_write, write_json

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
FILES = (WEIGHTS, CONFIG, feature_spec.FILE, "tokenizer.json")
"""What a model needs to answer."""


def build(config: ModelConfig, spec: FeatureSpec) -> FusedTransformer:
    return FusedTransformer(config, spec, len(field_rows(spec)))


def save_model(folder: Path, tensors: dict[str, torch.Tensor], config: ModelConfig, shards: Path) -> None:
    """Write everything of FILES into `folder`; spec and tokenizer are copied from `shards`."""
    write_tensors({name: t.contiguous().cpu() for name, t in tensors.items()}, folder / WEIGHTS)
    write_json(folder / CONFIG, config.model_dump(mode="json"))
    for name in (feature_spec.FILE, "tokenizer.json"):
        shutil.copyfile(shards / name, folder / name)


def write_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """A safetensors file that appears whole or not at all. A full disk is an OSError, which safetensors' own writer hides."""
    with atomic_write(path) as f:
        f.write(to_bytes(tensors))


def load_config(folder: Path) -> ModelConfig:
    try:
        data = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{folder} has no {CONFIG}", wanted="a checkpoint", cure="check the path") from None
    return parse(ModelConfig, data, str(folder / CONFIG))


def load_model(folder: Path, spec: FeatureSpec) -> FusedTransformer:
    """The model in `folder`. Raises ArtifactError when weights are missing, damaged, or do not fit config and spec."""
    model = build(load_config(folder), spec)
    try:
        model.load_state_dict(load_file(folder / WEIGHTS))
    except FileNotFoundError:
        raise ArtifactError(f"{folder} has no {WEIGHTS}", wanted="a checkpoint", cure="check the path") from None
    except (RuntimeError, SafetensorError) as error:
        first = str(error).strip().splitlines()[-1].strip()
        raise ArtifactError(
            f"the weights in {folder} do not fit its config and feature spec ({first})",
            cure="train again, or check the path",
        ) from None
    return model
