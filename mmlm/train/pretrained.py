"""A pretrained causal language model as the trunk: its folder is read, never run, and only safetensors are opened.

    config = settled(config, shards)          # the shape and the digest are filled in, or a ConfigError says what is wrong
    begin(..., config=nameless(config))       # the folder is no part of what the model is
    model = build(config.model, spec, shards) # weights, and rows of the vocabulary where the shards' tokenizer has them

Ids of the shards' tokenizer are those of the folder's, nine later, since our marks come first. A mark that the folder
knows (its own beginning, end and padding, or all nine in what `mmlm export` wrote) takes its row; the others are drawn
with the mean and the standard deviation of all rows.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from mmlm.errors import ConfigError
from mmlm.features import spec as feature_spec
from mmlm.features.spec import BOS, EOS, PAD, SPECIAL_TOKENS, FeatureSpec
from mmlm.features.text import Tokenizer
from mmlm.model.baseline_config import AnyModelConfig
from mmlm.model.config import ModelConfig, PretrainedConfig
from mmlm.model.fusion import Add
from mmlm.model.huggingface.encoder import EncoderModel, refuse
from mmlm.model.huggingface.settings import from_settings
from mmlm.model.huggingface.tensors import from_llama
from mmlm.model.transformer import FusedTransformer
from mmlm.shards.encoder_files import json_of
from mmlm.storage import sha256_file, sha256_json
from mmlm.train import encoders, stems, weights
from mmlm.train.config import LoopConfig

C = TypeVar("C", bound=LoopConfig)
MAX_JSON = 64 << 20
"""Bytes of a JSON file that are read at most; the largest tokenizer.json in use have about 35 MB."""
INDEX = "model.safetensors.index.json"
MARK = "<|mmlm_{}|>"
"""Name of one of our marks in a vocabulary that is not ours."""


def settle(config: ModelConfig, spec: FeatureSpec, shards: Path | None) -> ModelConfig:
    """The config with the shape of its pretrained trunk and the digest of that; as it is where there is none.

    Raises ConfigError when the folder is not what it should be, has another tokenizer than the shards in `shards`, or
    when the config says something else about the shape.
    """
    if config.pretrained is None:
        return config
    folder = folder_of(config.pretrained)
    settings = _read_json(folder / "config.json")
    encoder = None
    if settings.get("model_type") in encoders.KINDS:
        refuse(config, spec)
        found, encoder = encoders.fields(settings, _read_json(folder / "tokenizer.json"), str(folder), spec)
    else:
        found = from_settings(settings, str(folder), spec.max_len)
    if "preset" in config.model_fields_set and config.preset != "tiny":
        raise ConfigError(
            f"train.model.preset = {config.preset!r}, and train.model.pretrained",
            wanted="one of them",
            cure="leave preset away",
        )
    for name in found:
        if name in config.model_fields_set and getattr(config, name) != found[name]:
            raise ConfigError(
                f"train.model.{name} = {getattr(config, name)!r}, and train.model.pretrained",
                wanted=f"{found[name]!r}, as {folder} has it", cure=f"leave {name} away",
            )  # fmt: skip
    if shards:
        require_same_tokenizer(Tokenizer.load(shards), folder)
    digest = digest_of(folder)
    if config.pretrained.digest not in ("", digest):
        raise ConfigError(
            f"the model in {folder} has the digest {digest[:12]}", wanted=config.pretrained.digest[:12],
            cure="give the folder with that content, or leave train.model.pretrained.digest away",
        )  # fmt: skip
    return config.model_copy(
        update={**found, "pretrained": PretrainedConfig(folder=str(folder), digest=digest, encoder=encoder)}
    )


def settled(config: C, shards: Path | None, spec: FeatureSpec | None = None) -> C:
    """A stage's config with its `model` settled for the shard set in the folder `shards`; without one, for shards of `spec`
    that are still to be made."""
    model: AnyModelConfig = config.model  # type: ignore[attr-defined]
    if not isinstance(model, ModelConfig) or not model.brings_weights:
        return config
    if spec is None:
        assert shards is not None
        spec = feature_spec.load(shards)
    return config.model_copy(update={"model": stems.settle(settle(model, spec, shards), spec)})


def nameless(config: C) -> C:
    """A stage's config without the folder, which is no part of what a model is, and without what the content of an encoder's
    folder says."""
    model = _nameless(config.model)  # type: ignore[attr-defined]
    return config.model_copy(update={"model": stems.by_digest(model) if isinstance(model, ModelConfig) else model})


def _nameless(config: AnyModelConfig) -> AnyModelConfig:
    if not isinstance(config, ModelConfig):
        return config
    config = stems.nameless(config)
    if config.pretrained is None:
        return config
    return config.model_copy(update={"pretrained": config.pretrained.model_copy(update={"folder": ""})})


def build(config: AnyModelConfig, spec: FeatureSpec, shards: Path) -> FusedTransformer:
    """The model of a settled config; its own config does not tell the folder any more."""
    model = weights.build(_nameless(config), spec)
    if isinstance(config, ModelConfig):
        take_over(model, config, shards)
        stems.take_over(model, config, spec)
    return model


def take_over(model: FusedTransformer, config: ModelConfig, shards: Path) -> None:
    """Give `model` the weights of its pretrained trunk, on every rank by itself. What has no counterpart stays as it is,
    scaled to the size of the rows of the vocabulary. Raises ConfigError when a tensor lacks or has another shape."""
    if config.pretrained is None:
        return
    folder = folder_of(config.pretrained)
    tokenizer = Tokenizer.load(shards)
    settings = _read_json(folder / "config.json")
    if isinstance(model, EncoderModel):
        with _Weights.open(folder) as theirs:
            encoders.load(model, theirs, str(folder))
        return
    try:
        with _Weights.open(folder) as theirs:
            tensors = from_llama(theirs, config)
    except KeyError as error:
        raise ConfigError(
            f"the weights in {folder} lack {error}", wanted="every tensor that its config.json calls for",
            cure="use a whole checkpoint",
        ) from None  # fmt: skip
    if wrong := next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None):
        raise ConfigError(
            f"the weights in {folder} have values that are not numbers, in our {wrong}",
            wanted="numbers in all tensors: every loss would be none", cure="use another checkpoint",
        )  # fmt: skip
    known = _known_marks(folder, settings)
    for name in ("tokens.weight", "answer.weight"):
        if name in tensors:
            tensors[name] = _rows(tensors[name], model.tokens.num_embeddings, tokenizer.moved, known, folder)
    if config.tied:
        tensors["answer.weight"] = tensors["tokens.weight"]
    try:
        model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        first = str(error).strip().splitlines()[-1].strip()
        raise ConfigError(f"the weights in {folder} do not fit its config.json ({first})") from None
    _match(model, float(tensors["tokens.weight"].std()))


def digest_of(folder: Path) -> str:
    """sha256 over the names and bytes of the files that are read."""
    files = [folder / name for name in ("config.json", "tokenizer.json", INDEX) if (folder / name).is_file()]
    return sha256_json({path.name: sha256_file(path) for path in [*files, *_weight_files(folder)]})


def folder_of(config: PretrainedConfig) -> Path:
    if not config.folder:
        raise ConfigError(
            "train.model.pretrained has no folder",
            wanted="where the model lies",
            cure="set train.model.pretrained.folder",
        )
    return Path(os.path.abspath(os.path.expanduser(config.folder)))


def require_same_tokenizer(ours: Tokenizer, folder: Path) -> None:
    """Raise ConfigError unless texts have the same ids in the shards as in the model in `folder`."""
    path = folder / "tokenizer.json"
    theirs = _read_json(path)
    here = json.loads(ours.json)
    names = {token["id"]: token["content"] for token in theirs.get("added_tokens") or []}
    added = {token["id"]: token["content"] for token in here.get("added_tokens") or []}
    different = [key for key in ("model", "normalizer", "pre_tokenizer") if here.get(key) != theirs.get(key)]
    if different or not added.items() <= names.items():
        raise ConfigError(
            f"the shards were made with another tokenizer ({ours.digest[:12]}) than {path}: another "
            + (different[0] if different else "list of added tokens"),
            wanted="the tokenizer of the pretrained model",
            cure=f"set features.tokenizer.file to {path} and make the shards again (`--replace`)",
        )


def _match(model: FusedTransformer, size: float) -> None:
    """Let tokens of media be as large as tokens of text: ours begin at a standard deviation of 0.5, most pretrained ones
    at 0.02, and what is 25 times as large as its neighbours hardly hears what blocks add to it."""
    for name, module in model.named_children():
        if name not in ("tokens", "blocks", "norm", "answer", "label", "embedding", "fusion"):
            last = [m for m in module.modules() if isinstance(m, nn.Linear)][-1:]
            for part in (*last, *(m for m in module.modules() if isinstance(m, nn.Embedding))):
                for parameter in part.parameters():
                    parameter.data.mul_(size / 0.5)
    if isinstance(model.fusion, Add):  # whose encoders end in a norm, and are added to the text as they are
        for encoder in model.fusion.encoders.values():
            encoder.norm.weight.data.mul_(size)  # type: ignore[union-attr, operator]


def _rows(theirs_VD: torch.Tensor, size: int, moved: int, known: Mapping[int, int], folder: Path) -> torch.Tensor:
    """The vocabulary of `size` ids, ours first. `known` maps some of our marks to their rows."""
    used = size - moved
    if len(theirs_VD) < used:
        raise ConfigError(
            f"the vocabulary in {folder} has {len(theirs_VD)} rows", wanted=f"{used}, as many as its tokenizer.json names",
            cure="use a whole checkpoint",
        )  # fmt: skip
    rows_VD = theirs_VD[:used]
    if not moved:
        return rows_VD
    draw = torch.Generator().manual_seed(0)
    marks_MD = torch.randn(moved, rows_VD.shape[1], generator=draw) * rows_VD.std(0) + rows_VD.mean(0)
    for mark, row in known.items():
        marks_MD[mark] = theirs_VD[row]
    return torch.cat([marks_MD, rows_VD])


def _known_marks(folder: Path, settings: Mapping[str, Any]) -> dict[int, int]:
    """Our mark → the row of the folder's model that means the same."""
    known: dict[int, int] = {}
    for mark, key in ((BOS, "bos_token_id"), (EOS, "eos_token_id"), (PAD, "pad_token_id")):
        row = settings.get(key)
        row = row[0] if isinstance(row, list) and row else row
        if isinstance(row, int) and 0 <= row < int(settings.get("vocab_size") or 0):
            known[mark] = row
    tokens = {
        token["content"]: token["id"] for token in _read_json(folder / "tokenizer.json").get("added_tokens") or []
    }
    for mark, name in enumerate(SPECIAL_TOKENS):
        if MARK.format(name[1:-1]) in tokens:
            known[mark] = tokens[MARK.format(name[1:-1])]
    return known


class _Weights(Mapping[str, torch.Tensor]):
    """The tensors of a folder by name, read when they are asked for."""

    def __init__(self, files: dict[str, Any]) -> None:
        self._files = files

    @classmethod
    @contextlib.contextmanager
    def open(cls, folder: Path) -> Iterator[_Weights]:
        with contextlib.ExitStack() as stack:
            files: dict[str, Any] = {}
            for path in _weight_files(folder):
                try:
                    file = stack.enter_context(safe_open(path, "pt"))
                except (SafetensorError, OSError) as error:
                    raise ConfigError(f"{path} cannot be read ({error})", cure="use a whole checkpoint") from None
                files |= dict.fromkeys(file.keys(), file)
            yield cls(files)

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._files[name].get_tensor(name)
        if not tensor.is_floating_point():
            raise ConfigError(
                f"{name} holds {tensor.dtype}", wanted="plain weights", cure="use a checkpoint that has them"
            )
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors that the index names, or the one there is. Raises ConfigError."""
    if (folder / INDEX).is_file():
        names = sorted(set(_read_json(folder / INDEX).get("weight_map", {}).values()))
        if strange := [n for n in names if Path(n).name != n or not (folder / n).is_file()]:
            raise ConfigError(
                f"the index of {folder} names {strange[0]!r}", wanted="files that lie in the folder",
                cure="copy the whole folder",
            )  # fmt: skip
        return [folder / name for name in names]
    if not (folder / "model.safetensors").is_file():
        pickles = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth"))
        raise ConfigError(
            f"{folder} has no model.safetensors" + (f", only {', '.join(pickles)}" if pickles else ""),
            wanted="weights as safetensors: pickles can run code and are never opened",
            cure="load it with transformers where you trust it, then `save_pretrained`",
        )
    return [folder / "model.safetensors"]


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file that must be there. Raises ConfigError."""
    found = json_of(path, MAX_JSON)
    if found is None:
        what = f"{path.parent} has no {path.name}" if path.parent.is_dir() else f"there is no folder {path.parent}"
        raise ConfigError(
            what, wanted="a causal language model as transformers writes it: config.json, tokenizer.json, safetensors",
            cure="check train.model.pretrained.folder",
        )  # fmt: skip
    return found
