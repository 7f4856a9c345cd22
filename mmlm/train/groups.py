"""Which parameters are updated alike: by rule, weight decay, rate and freezing."""

from __future__ import annotations

import difflib
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import nn

from mmlm.errors import ConfigError
from mmlm.model.flops import Frozen
from mmlm.train.config import FreezeConfig, LoopConfig, MuonConfig

Span = tuple[int, int | None]
"""Steps [first, last) in which a group is frozen; None: to the end."""


class Treatment(NamedTuple):
    """What parameters of one group have in common."""

    rule: str
    """`adamw`, `lion` or `muon`."""
    decays: bool
    factor: float
    """Of the learning rate."""
    spans: tuple[Span, ...]

    @property
    def name(self) -> str:
        """Distinct, and the same in every run of a config: it names the group's counters in a checkpoint."""
        frozen = "".join(f"-{first}:{'' if last is None else last}" for first, last in self.spans)
        factor = f"{self.factor:g}" if float(f"{self.factor:g}") == self.factor else repr(self.factor)
        return f"{self.rule}{'-decay' if self.decays else ''}-x{factor}{frozen}"


def parameter_groups(model: nn.Module, config: LoopConfig) -> list[dict[str, Any]]:
    """Groups for the optimizer, of the parameters that are trained. Matrices of linear maps decay; embeddings, norms and
    biases do not.

    Raises ConfigError when a pattern of `lr_factors`, `freeze` or `optimizer.modules` fits no parameter, or none is left.
    """
    named = dict(model.named_parameters())
    trained = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    _check([name for name in named if name in trained or rests(name, config)], config)
    if not trained:
        raise ConfigError("`freeze` leaves no parameter to be trained", wanted="an `end`, or fewer modules")
    matrices = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    matrices -= {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}  # a head may be tied to one
    groups: dict[Treatment, dict[str, Any]] = {}
    for name, parameter in trained.items():
        decays = id(parameter) in matrices
        rule = _rule(name, decays, config)
        factor = _factor(name, config) * _rate(parameter, rule)
        treatment = Treatment(rule, decays, factor, _spans(name, config.freeze))
        if treatment not in groups:
            decay = config.optimizer.weight_decay if decays else 0.0
            groups[treatment] = {"params": [], **treatment._asdict(), "name": treatment.name, "weight_decay": decay}
            groups[treatment]["parts"] = {}
        groups[treatment]["params"].append(parameter)
        groups[treatment]["parts"][name] = getattr(parameter, "parts", 1)  # matrices in one, for Muon
    return list(groups.values())


def let_rest(model: nn.Module, config: LoopConfig) -> dict[str, nn.Parameter]:
    """What no step trains (`freeze` from step 0 without an end, and what its model calls `fixed`) asks for no gradient from now
    on: nothing is computed for it, and no optimizer keeps anything. Returns these parameters by name."""
    resting = {
        name: p for name, p in model.named_parameters()
        if getattr(p, "fixed", False) or (p.requires_grad and rests(name, config))
    }  # fmt: skip
    for parameter in resting.values():
        parameter.requires_grad_(False)
    return resting


def frozen_share(model: nn.Module) -> Frozen:
    """How much of the matrices of linear maps has no gradient; those of pretrained encoders apart."""
    sizes: dict[str, list[tuple[bool, int]]] = {"maps": [], "image": [], "audio": []}
    for name, m in model.named_modules():
        if isinstance(m, nn.Linear):
            inside, _, rest = name.partition(".project.encoder.")
            size = getattr(m.weight, "ds_numel", None) or m.weight.numel()  # ZeRO 3 empties them
            sizes[inside if rest else "maps"].append((m.weight.requires_grad, size))
    maps, image, audio = (
        sum(n for learns, n in some if not learns) / max(1, sum(n for _, n in some)) for some in sizes.values()
    )
    return Frozen(maps, (image, audio))


def frozen(spans: tuple[Span, ...], step: int) -> bool:
    return any(first <= step and (last is None or step < last) for first, last in spans)


def fits(pattern: str, name: str) -> bool:
    """Whether `pattern` is the parameter `name`, or a module that holds it."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _rule(name: str, is_matrix: bool, config: LoopConfig) -> str:
    optimizer = config.optimizer
    if isinstance(optimizer, MuonConfig):
        return "muon" if is_matrix and any(fits(p, name) for p in optimizer.modules) else "adamw"
    return optimizer.kind


def _factor(name: str, config: LoopConfig) -> float:
    return next((factor for pattern, factor in config.lr_factors.items() if fits(pattern, name)), 1.0)


def _rate(parameter: nn.Parameter, rule: str) -> float:
    """What the width makes of the rate (model/initialise.py). A step of Muon is as large as one of AdamW entry by entry, but
    has no direction that stands out, so that what it adds to a sum over n inputs grows with √n, not n."""
    rate = float(getattr(parameter, "rate", 1.0))
    return rate**0.5 if rule == "muon" else rate


def _spans(name: str, freezes: list[FreezeConfig]) -> tuple[Span, ...]:
    return tuple((f.start, f.end) for f in freezes if any(fits(pattern, name) for pattern in f.modules))


def rests(name: str, config: LoopConfig) -> bool:
    return (0, None) in _spans(name, config.freeze)


def _check(names: list[str], config: LoopConfig) -> None:
    patterns = {"lr_factors": list(config.lr_factors), "freeze": [p for f in config.freeze for p in f.modules]}
    if isinstance(config.optimizer, MuonConfig):
        patterns["optimizer.modules"] = list(config.optimizer.modules)
    for key, given in patterns.items():
        for pattern in given:
            if not any(fits(pattern, name) for name in names):
                modules = sorted({name.rsplit(".", depth)[0] for name in names for depth in range(1, 5)})
                close = difflib.get_close_matches(pattern, [*modules, *names], 1, 0.0)
                raise ConfigError(
                    f"`{key}` names {pattern!r}, which fits no parameter of the model",
                    wanted=f"a module, a parameter, or a pattern of them with * and ?, such as `{close[0]}`",
                )
