"""Verb export: a model → a folder that other programs read.

Adapters are merged into the maps, the active one or that which is asked for.
`llama`: the trunk alone as LlamaForCausalLM, Qwen2ForCausalLM or Qwen3ForCausalLM of transformers, with its tokenizer;
`hf`: the whole model, of any kind, with its own modelling code, for `AutoModel.from_pretrained(DIR, trust_remote_code=True)`;
`safetensors`: weights, settings, feature spec and tokenizer as they lie in a checkpoint.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mmlm.data.collate import field_rows
from mmlm.errors import ArtifactError, ConfigError
from mmlm.features import spec as feature_spec
from mmlm.features.spec import BOS, EOS, PAD, SPECIAL_TOKENS, FeatureSpec
from mmlm.features.text import Tokenizer
from mmlm.model import adapters
from mmlm.model.huggingface.settings import to_settings
from mmlm.model.huggingface.tensors import to_llama
from mmlm.model.transformer import FusedTransformer
from mmlm.publish import exported_tokenizer, remote_code
from mmlm.publish.answering import NO_ADAPTER
from mmlm.publish.locate import checkpoint_folder
from mmlm.storage import write_json
from mmlm.train import weights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_FILE = 5 << 30
"""Bytes of tensors in one file; more are spread over several, with an index."""


@dataclass
class Source:
    """A model as it lies in its folder."""

    folder: Path
    spec: FeatureSpec
    tokenizer: Tokenizer
    model: FusedTransformer


@dataclass
class Exported:
    """What became of it."""

    folder: Path
    architecture: str
    parameters: int
    left_out: list[str] = field(default_factory=list)
    """Parts of the model that the form has no place for."""

    def words(self) -> str:
        text = f"{self.folder}: {self.architecture}, {self.parameters:,} parameters"
        return text + (f"; left out: {', '.join(self.left_out)}" if self.left_out else "")


def export(
    model: str, to: Path, form: str, *, dtype: str = "float32", adapter: str | None = None,
    tracking_uri: str | None = None, max_file: int = MAX_FILE,
) -> Exported:  # fmt: skip
    """Write `model` (a registry URI or a folder) into the new folder `to` in the form `llama`, `hf` or `safetensors`.

    `adapter` is the one that is merged, or `none`. Raises ArtifactError when there is no such model or `to` is not empty,
    ConfigError when the form cannot hold it or there is no such adapter.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ArtifactError(f"{to} is there already", wanted="a new folder", cure="choose another --to")
    folder = checkpoint_folder(model, tracking_uri)
    spec = feature_spec.load(folder)
    net = weights.load_model(folder, spec).eval()
    if adapter is not None:
        adapters.switch(net, None if adapter == NO_ADAPTER else adapter)
    adapters.merge(net)
    if form == "llama" and type(net) is not FusedTransformer:
        raise ConfigError(
            f"--format {form} of a {type(net).__name__}", wanted="a model of kind transformer and layout decoder",
            cure="export it with --format hf or safetensors",
        )  # fmt: skip
    source = Source(folder, spec, Tokenizer.load(folder), net)
    temporary = to.with_name(f".{to.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        made = FORMS[form](source, temporary, DTYPES[dtype], max_file)
        if to.exists():
            to.rmdir()
        os.rename(temporary, to)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    made.folder = to
    return made


def _llama(source: Source, folder: Path, dtype: torch.dtype, max_file: int) -> Exported:
    config, marks = source.model.config, source.tokenizer.moved
    settings = to_settings(config, source.spec.vocab_size, source.spec.max_len)
    last = source.spec.vocab_size - marks
    bos, eos, pad = (i + (last if marks else 0) for i in (BOS, EOS, PAD))
    ids = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad}
    settings |= {**ids, "dtype": str(dtype).removeprefix("torch.")}
    tensors = to_llama(source.model.state_dict(), config, marks)
    _write_weights({name: t.to(dtype) for name, t in tensors.items()}, folder, max_file)
    write_json(folder / "config.json", settings)
    write_json(folder / "generation_config.json", {**ids, "do_sample": False})
    exported_tokenizer.write(source.tokenizer, source.spec, folder, marks_last=True)
    parts = {name.split(".")[0] for name in source.model.state_dict()} - {"tokens", "blocks", "norm", "answer"}
    return Exported(folder, settings["architectures"][0], sum(t.numel() for t in tensors.values()), sorted(parts))


def _hf(source: Source, folder: Path, dtype: torch.dtype, max_file: int) -> Exported:
    remote_code.write(folder)
    rows = len(field_rows(source.spec))
    if source.model.generates:
        architecture, task = "MmlmForConditionalGeneration", "AutoModelForCausalLM"
    else:
        architecture, task = "MmlmForSequenceClassification", "AutoModelForSequenceClassification"
    settings = {
        "model_type": "mmlm",
        "architectures": [architecture],
        "auto_map": {
            "AutoConfig": f"{remote_code.NAME}.MmlmConfig",
            **dict.fromkeys(("AutoModel", task), f"{remote_code.NAME}.{architecture}"),
        },
        "model": source.model.config.model_dump(mode="json"),
        "spec": source.spec.model_dump(mode="json"),
        "field_rows": rows,
        "id2label": dict(enumerate(_columns(source.spec))),
        "vocab_size": source.spec.vocab_size,
        "tie_word_embeddings": False,
        "use_cache": source.model.generates,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "dtype": str(dtype).removeprefix("torch."),
    }
    write_json(folder / "config.json", settings)
    ids = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    marks = [i for i in range(len(SPECIAL_TOKENS)) if i != EOS]  # which an answer never holds here either
    told = {**ids, "do_sample": False, "use_cache": source.model.generates, "suppress_tokens": marks}
    write_json(folder / "generation_config.json", told)
    tensors = {f"net.{name}": t.to(dtype) for name, t in source.model.state_dict().items()}
    _write_weights(tensors, folder, max_file)
    exported_tokenizer.write(source.tokenizer, source.spec, folder, marks_last=False)
    return Exported(folder, architecture, sum(p.numel() for p in source.model.parameters()))


def _columns(spec: FeatureSpec) -> list[str]:
    """What the class head says, column by column: all classes, then all numbers; of several tasks with the task's name."""
    several = len(spec.tasks) > 1
    classes = [f"{task.name}: {label}" if several else label for task in spec.tasks for label in task.labels]
    return [*classes, *(task.name for task in spec.tasks if task.number)]


def _safetensors(source: Source, folder: Path, dtype: torch.dtype, max_file: int) -> Exported:
    tensors = {name: t.to(dtype) for name, t in source.model.state_dict().items()}
    for name in (weights.CONFIG, feature_spec.FILE, "tokenizer.json"):
        shutil.copyfile(source.folder / name, folder / name)
    weights.write_tensors(tensors, folder / weights.WEIGHTS, {"format": "pt"})
    return Exported(folder, type(source.model).__name__, sum(p.numel() for p in source.model.parameters()))


FORMS: dict[str, Callable[[Source, Path, torch.dtype, int], Exported]] = {
    "llama": _llama,
    "hf": _hf,
    "safetensors": _safetensors,
}


def _write_weights(tensors: Mapping[str, torch.Tensor], folder: Path, max_file: int) -> None:
    """One file, or as many as `max_file` asks for and `model.safetensors.index.json`, as transformers reads them."""
    files: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        bytes_ = tensor.numel() * tensor.element_size()
        if files[-1] and size + bytes_ > max_file:
            files.append({})
            size = 0
        files[-1][name] = tensor
        size += bytes_
    if len(files) == 1:
        weights.write_tensors(files[0], folder / weights.WEIGHTS, {"format": "pt"})
        return
    where: dict[str, str] = {}
    for number, some in enumerate(files, 1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        weights.write_tensors(some, folder / file, {"format": "pt"})
        where |= dict.fromkeys(some, file)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})
