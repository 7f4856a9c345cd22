"""The update rules, on the flat float32 shares that ZeRO leaves to each rank.

One optimizer serves all parameters: each group names its rule, so Muon's matrices and AdamW's rest share one step. Every
rule but Muon is elementwise and does not care how the parameters are cut; Muon makes its matrices whole first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from mmlm.train.config import LoopConfig, MuonConfig
from mmlm.train.muon import orthogonal
from mmlm.train.shares import Share

State = dict[str, Tensor]


class Optimizer(torch.optim.Optimizer):
    """AdamW, Lion and Muon by group, and the average of the weights.

    `shares` is filled by the engine once ZeRO has cut the parameters. `hold` lets a step pass without any change;
    `updates` is the number of steps that were no such steps, and weighs the average.
    """

    def __init__(self, groups: list[dict[str, Any]], config: LoopConfig) -> None:
        super().__init__(groups, {"lr": config.optimizer.lr, "frozen": False})
        self.settings, self.ema = config.optimizer, config.ema
        self.low_precision = config.precision != "fp32"
        self.hold = True  # DeepSpeed takes a step when it is built (stage 0)
        self.updates = 0
        self.shares: dict[Tensor, Share] = {}

    def kinds(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Names of the state tensors of a group's parameters."""
        return KINDS[group["rule"]] + (("ema",) if self.ema else ())

    def prepare(self, share: Share) -> None:
        """Give `share` its state: zeros, the count of updates, and the average, which starts at the weights."""
        self.shares[share.tensor] = share
        state = self.state[share.tensor]
        state["step"] = torch.zeros((), dtype=torch.float32, device=share.tensor.device)
        for kind in self.kinds(share.group):
            state[kind] = share.tensor.detach().clone() if kind == "ema" else torch.zeros_like(share.tensor)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if self.hold:
            return
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not group["frozen"] and parameter.grad is not None:
                    RULES[group["rule"]](self, parameter, parameter.grad, state, group)
                if self.ema:
                    decay = min(self.ema.decay, (2 + self.updates) / (11 + self.updates))
                    state["ema"].lerp_(parameter, 1 - decay)


def _adamw(self: Optimizer, parameter: Tensor, gradient: Tensor, state: State, group: dict[str, Any]) -> None:
    """Loshchilov & Hutter 2019, algorithm 2."""
    torch_adamw(
        [parameter], [gradient], [state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]],
        foreach=False, fused=True, amsgrad=False, beta1=self.settings.beta1, beta2=self.settings.beta2,
        lr=group["lr"], weight_decay=group["weight_decay"], eps=1e-8, maximize=False,
    )  # fmt: skip


def _lion(self: Optimizer, parameter: Tensor, gradient: Tensor, state: State, group: dict[str, Any]) -> None:
    """Chen et al. 2023, algorithm 2."""
    momentum = state["momentum"]
    state["step"] += 1
    update = momentum.lerp(gradient, 1 - self.settings.beta1).sign_()
    parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])
    momentum.lerp_(gradient, 1 - self.settings.beta2)


def _muon(self: Optimizer, parameter: Tensor, gradient: Tensor, state: State, group: dict[str, Any]) -> None:
    """Jordan et al. 2024. Each rank makes orthogonal what it holds a part of: at ZeRO 3 a part of every matrix."""
    assert isinstance(self.settings, MuonConfig)
    momentum = state["momentum"]
    state["step"] += 1
    momentum.lerp_(gradient, 1 - self.settings.momentum)
    update, share = gradient.lerp(momentum, self.settings.momentum), self.shares[parameter]
    dtype = torch.bfloat16 if self.low_precision else torch.float32
    for number, matrix in share.wholes(update):
        if share.holds(number):
            parts = group["parts"].get(share.runs[number].name, 1)
            share.put(update, number, orthogonal(matrix, self.settings.iterations, dtype, parts))
    parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])


KINDS: dict[str, tuple[str, ...]] = {
    "adamw": ("exp_avg", "exp_avg_sq"),
    "lion": ("momentum",),
    "muon": ("momentum",),
}
RULES: dict[str, Callable[[Optimizer, Tensor, Tensor, State, dict[str, Any]], None]] = {
    "adamw": _adamw,
    "lion": _lion,
    "muon": _muon,
}
