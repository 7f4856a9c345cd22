"""LoRA adapters on the linear maps of a model: added, trained, switched, merged. The only module that imports peft.

An adapter is a name and, for each adapted map, two small matrices. Several may lie on one model; one of them, or none,
is active.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from mmlm.errors import ConfigError
from mmlm.model.config import LoraConfig
from mmlm.model.cross_entropy import AnswerHead, AnswerLoss, Lead

DEFAULT = "default"
"""Name of the adapter that a training makes."""
PARTS = "adapter_parts"
"""Attribute of a model: adapter → tensors of what was trained along with it, by the names of a model without adapters. None →
what the base has in their places, of these parts alone."""
TRUNK = ("tokens", "blocks", "norm", "answer", "encoder")
"""What a pretrained trunk brings along."""


def add(model: nn.Module, config: LoraConfig, name: str = DEFAULT, targets: Iterable[str] | None = None) -> None:
    """Put an adapter that changes nothing yet on every linear map that `config.targets` names (or on the modules
    `targets`), and make it the active one. Raises ConfigError when no map fits, or peft is not installed."""
    patterns = config.targets if len(getattr(model, "blocks", ())) else _encoder_for_blocks(config.targets)
    modules = sorted(targets) if targets is not None else adapted(model, patterns)
    if any(m.split(".")[0] == "answer" for m in modules) and getattr(model.config, "tied", False):  # type: ignore
        raise ConfigError(
            "lora.targets names `answer`, which is tied to the embedding of the tokens", wanted="maps of their own",
            cure="leave answer out of lora.targets",
        )  # fmt: skip
    peft = _peft()
    settings = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=modules, bias="none"
    )
    settings._register_custom_module({AnswerHead: _adapted_head()})
    kept = model.config
    model.config = {}  # type: ignore[assignment]  # peft looks for a mapping with settings of transformers
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several are meant
            peft.inject_adapter_in_model(settings, model, adapter_name=name)
    finally:
        model.config = kept
    switch(model, name)


def _encoder_for_blocks(patterns: Iterable[str]) -> tuple[str, ...]:
    """A BERT-style model's layers lie below `encoder`."""
    return tuple("encoder" if pattern == "blocks" else pattern for pattern in patterns)


def freeze_base(model: nn.Module, config: LoraConfig) -> None:
    """Let only adapters learn, and what `config.also` names."""
    for name, parameter in model.named_parameters():
        top = name.split(".")[0]
        also = top not in TRUNK if config.also is None else any(_fits(pattern, name) for pattern in config.also)
        parameter.requires_grad_(is_adapter(name) or also)
    if config.also is not None:
        names = [name for name, _ in model.named_parameters()]
        for pattern in config.also:
            if not any(_fits(pattern, name) for name in names):
                raise ConfigError(
                    f"`lora.also` names {pattern!r}, which fits no parameter of the model",
                    wanted=f"a module or a pattern, such as {', '.join(sorted({n.split('.')[0] for n in names}))}",
                )


def adapted(model: nn.Module, patterns: Iterable[str]) -> list[str]:
    """Names of the linear maps that fit the patterns, sorted. Raises ConfigError for a pattern that fits none."""
    maps = adapted_maps(model, all_maps=True)
    found: set[str] = set()
    for pattern in patterns:
        some = [name for name in maps if _fits(pattern, name)]
        if not some:
            raise ConfigError(
                f"`lora.targets` names {pattern!r}, which fits no linear map of the model",
                wanted=f"a module or a pattern, such as blocks, *.attention.qkv or {maps[0]}",
            )
        found.update(some)
    return sorted(found)


def adapted_maps(model: nn.Module, *, all_maps: bool = False) -> list[str]:
    """The maps that have an adapter, by the names that they have without one; or all linear maps there are."""
    found = {n for n, m in model.named_modules() if _is_layer(m) or (all_maps and isinstance(m, nn.Linear))}
    return sorted(n.removesuffix(".base_layer") for n in found if not is_adapter(f"{n}.weight"))


def switch(model: nn.Module, name: str | None) -> None:
    """Make the adapter `name` the active one, with the parts that were trained along with it; or none. Where an adapter has no
    parts of its own, the base's are. Raises ConfigError when there is no such adapter."""
    if name is not None and name not in names(model):
        raise ConfigError(
            f"the model has no adapter {name!r}", wanted=", ".join(names(model)) or "a model with adapters",
            cure="ask without an adapter",
        )  # fmt: skip
    for layer in _layers(model):
        layer.enable_adapters(name is not None)
        if name is not None:
            layer.set_adapter(name)
    parts = getattr(model, PARTS, {})
    wanted = {**parts.get(None, {}), **parts.get(name, {})}
    if wanted:
        # a map that another adapter lies on has moved below `base_layer`
        here = {key.replace(".base_layer.", "."): key for key in model.state_dict()}
        model.load_state_dict({here[key]: part for key, part in wanted.items() if key in here}, strict=False)


def names(model: nn.Module) -> list[str]:
    """The adapters that lie on the model, sorted."""
    return sorted({name for layer in _layers(model) for name in layer.lora_A})


def active(model: nn.Module) -> str | None:
    for layer in _layers(model):
        return None if layer.disable_adapters else str(layer.active_adapters[0])
    return None


def merge(model: nn.Module) -> None:
    """Add the active adapter to the maps for good, and take all adapters away."""
    for parent in list(model.modules()):
        layer: Any
        for child, layer in list(parent.named_children()):
            if _is_layer(layer):
                if not layer.disable_adapters:
                    layer.merge()
                setattr(parent, child, layer.get_base_layer())
    vars(model).pop(PARTS, None)


def own_names(state: Mapping[str, torch.Tensor], name: str = DEFAULT) -> dict[str, torch.Tensor]:
    """Of a model's tensors those of one adapter, as `MODULE.lora_A.weight` and `MODULE.lora_B.weight`."""
    return {
        key.replace(f".{name}.weight", ".weight"): value
        for key, value in state.items()
        if is_adapter(key) and key.endswith(f".{name}.weight")
    }


def load(model: nn.Module, found: Mapping[str, torch.Tensor], name: str) -> None:
    """Set the matrices of one adapter and what was trained along with it, and make it the active one.

    Raises ConfigError when one is missing or of another shape.
    """
    here = {key: p for key, p in model.named_parameters() if is_adapter(key) and key.endswith(f".{name}.weight")}
    for key, parameter in here.items():
        given = found.get(key.replace(f".{name}.weight", ".weight"))
        if given is None or given.shape != parameter.shape:
            raise ConfigError(
                f"the adapter {name!r} {'lacks' if given is None else 'has another shape of'} {key}",
                wanted=f"{tuple(parameter.shape)}", cure="use the adapter of this model",
            )  # fmt: skip
        parameter.data.copy_(given)
    switch(model, None)
    parts: dict[str | None, dict[str, torch.Tensor]] = getattr(model, PARTS, {None: {}})
    parts[name] = base_names(found)
    own = base_names(model.state_dict())
    parts[None] |= {key: own[key].clone() for key in parts[name] if key in own and key not in parts[None]}
    setattr(model, PARTS, parts)
    switch(model, name)


def base_names(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors without those of adapters, by the names that they have in a model without any."""
    return {key.replace(".base_layer.", "."): value for key, value in state.items() if not is_adapter(key)}


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return ".lora_A." in name or ".lora_B." in name


def _fits(pattern: str, name: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if _is_layer(module)]


def _is_layer(module: Any) -> bool:
    return hasattr(module, "lora_A") and hasattr(module, "get_base_layer")


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise ConfigError(
            "adapters need peft, which is not installed", cure="pip install 'mmlm-workflows[adapters]'"
        ) from None
    return peft


def _adapted_head() -> type[nn.Module]:
    """The head over the vocabulary with an adapter, made when peft is there to inherit from."""
    from peft.tuners.lora.layer import Linear

    class AdaptedHead(Linear):  # type: ignore[misc,valid-type]
        """Its loss needs the weights whole: B A is made by the maps themselves, since ZeRO 3 has the weights of a module
        only while that is called. What A reads is not dropped here."""

        def forward(  # type: ignore[override]
            self, x_AD: torch.Tensor, target_A: torch.Tensor | None = None, z: float = 0.0, lead: Lead | None = None
        ) -> torch.Tensor | AnswerLoss:
            if target_A is None or self.merged or self.disable_adapters:
                return self.base_layer(x_AD, target_A, z, lead=lead) if target_A is not None else super().forward(x_AD)
            (name,) = self.active_adapters
            one_DD = torch.eye(x_AD.shape[-1], dtype=x_AD.dtype, device=x_AD.device)
            delta_VD = self.lora_B[name](self.lora_A[name](one_DD)).T * self.scaling[name]
            return self.base_layer(x_AD, target_A, z, delta_VD, lead)

    return AdaptedHead
