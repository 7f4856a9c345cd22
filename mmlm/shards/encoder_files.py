"""The files of a pretrained encoder's checkpoint: which are read, and their digest. Pickles are never opened."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mmlm.errors import ConfigError
from mmlm.features.config import EncoderConfig
from mmlm.storage import sha256_file, sha256_json

MAX_JSON = 16 << 20
"""Bytes of a checkpoint's JSON file, at most."""
_SETTINGS = ("config.json", "preprocessor_config.json", "processor_config.json", "model.safetensors.index.json")


def digest(config: EncoderConfig) -> str:
    """sha256 over the names and bytes of the files of a checkpoint that are read. Raises ConfigError."""
    return sha256_json({path.name: sha256_file(path) for path in files_of(config)})


def folder_of(config: EncoderConfig) -> str:
    return os.path.abspath(os.path.expanduser(config.folder))


def files_of(config: EncoderConfig) -> list[Path]:
    """The files of a checkpoint that are read, sorted. Raises ConfigError when it is none, or has only pickles."""
    folder = Path(folder_of(config))
    if not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "is no folder"
        raise ConfigError(
            f"{config.folder} {what}", wanted="a checkpoint folder of transformers on local disk (config.json, *.safetensors)",
            cure="check where it lies; `save_pretrained` of transformers writes such a folder",
        )  # fmt: skip
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickles = sorted(
            p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5")
        )
        raise ConfigError(
            f"{config.folder} has no *.safetensors" + (f", only {', '.join(pickles)}" if pickles else ""),
            wanted="weights as safetensors: pickles can run code and are never opened",
            cure="convert it where you trust it: load it with transformers, then `save_pretrained`",
        )
    index = read_json(config, "model.safetensors.index.json")
    named = set((index or {}).get("weight_map", {}).values())
    if strange := sorted(map(str, named - {path.name for path in weights})):
        raise ConfigError(f"the index of {config.folder} names {strange[0]!r}", wanted="files that lie in the folder")
    return sorted([*(folder / name for name in _SETTINGS if (folder / name).is_file()), *weights])


def read_json(config: EncoderConfig, name: str) -> dict[str, Any] | None:
    return json_of(Path(folder_of(config)) / name)


def json_of(path: Path, most: int = MAX_JSON) -> dict[str, Any] | None:
    """The object in a JSON file of a checkpoint, None where there is no such file.

    Raises ConfigError when it is no JSON, no object, or of more than `most` bytes.
    """
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
        if len(data) > most:
            raise ValueError("it is too long")
        found = json.loads(data)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read ({error})", wanted="a JSON file") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds {type(found).__name__}", wanted="an object")
    return found
