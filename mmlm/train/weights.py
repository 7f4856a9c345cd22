"""A model at rest: `model.safetensors` + `config.json` beside the feature spec and the tokenizer of its shards."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from mmlm.config import parse
from mmlm.data.collate import field_rows
from mmlm.errors import ArtifactError
from mmlm.features import spec as feature_spec
from mmlm.features.spec import FeatureSpec
from mmlm.model import kinds
from mmlm.model.baseline_config import CONFIGS, AnyModelConfig, CnnConfig
from mmlm.model.config import ModelConfig
from mmlm.model.convolutional import refuse
from mmlm.model.layouts import require_classes
from mmlm.model.transformer import FusedTransformer
from mmlm.storage import atomic_write, write_json

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
FILES = (WEIGHTS, CONFIG, feature_spec.FILE, "tokenizer.json")
"""What a model needs to answer."""
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64", torch.int32: "I32",
          torch.uint8: "U8", torch.bool: "BOOL"}  # fmt: skip
"""Names of dtypes in the header of a safetensors file."""


def build(config: AnyModelConfig, spec: FeatureSpec) -> FusedTransformer:
    """The model that `config` asks for, with new weights. Raises ConfigError when it cannot do what the spec wants."""
    return kinds.build(config, spec, len(field_rows(spec)))


def check(config: AnyModelConfig, spec: FeatureSpec) -> None:
    """Raise ConfigError before anything starts, when the model cannot do what the spec wants."""
    if isinstance(config, CnnConfig):
        refuse(spec)
    if isinstance(config, ModelConfig) and config.layout == "encoder":
        require_classes(spec)


def save_model(folder: Path, tensors: dict[str, torch.Tensor], config: AnyModelConfig, shards: Path) -> None:
    """Write everything of FILES into `folder`; spec and tokenizer are copied from `shards`."""
    write_tensors({name: t.contiguous().cpu() for name, t in tensors.items()}, folder / WEIGHTS)
    write_json(folder / CONFIG, config.model_dump(mode="json"))
    for name in (feature_spec.FILE, "tokenizer.json"):
        shutil.copyfile(shards / name, folder / name)


def write_tensors(tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> str:
    """A safetensors file that appears whole or not at all; returns its sha256.

    Written here, tensor by tensor, hashed as it goes: safetensors' own writer first makes all bytes in memory, and
    hides a full disk, which is an OSError here. Layout: 8 bytes length, a JSON header, the raw tensors.
    """
    header: dict[str, dict[str, object]] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in sorted(tensors.items()):
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with atomic_write(path) as f:
        for data in (len(text).to_bytes(8, "little"), text):
            digest.update(data)
            f.write(data)
        for _, tensor in sorted(tensors.items()):
            raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            digest.update(raw)
            f.write(raw)
    return digest.hexdigest()


def load_config(folder: Path) -> AnyModelConfig:
    try:
        data = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{folder} has no {CONFIG}", wanted="a checkpoint", cure="check the path") from None
    kind = data.get("kind", "transformer") if isinstance(data, dict) else "transformer"
    return parse(CONFIGS.get(kind, ModelConfig), data, str(folder / CONFIG))


def load_model(folder: Path, spec: FeatureSpec) -> FusedTransformer:
    """The model in `folder`, with its adapters if it has any.

    Raises ArtifactError when weights are missing, damaged, or do not fit config and spec.
    """
    model = build(load_config(folder), spec)
    try:
        tensors = load_file(folder / WEIGHTS)
        if isinstance(model.config, ModelConfig) and model.config.tied:
            tensors.setdefault("answer.weight", tensors["tokens.weight"])
        model.load_state_dict(tensors)
    except FileNotFoundError:
        raise ArtifactError(f"{folder} has no {WEIGHTS}", wanted="a checkpoint", cure="check the path") from None
    except (RuntimeError, SafetensorError, KeyError) as error:
        first = str(error).strip().splitlines()[-1].strip()
        raise ArtifactError(
            f"the weights in {folder} do not fit its config and feature spec ({first})",
            cure="train again, or check the path",
        ) from None
    if (folder / "adapters").is_dir():
        from mmlm.train import adapted

        adapted.load_all(model, folder)
    return model
