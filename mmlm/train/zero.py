"""Where DeepSpeed 0.19.8 keeps what it has cut: the float32 shares of its four kinds of optimizer.

Its own `safe_get_full_*` and `safe_set_full_*` go parameter by parameter, link states only after the first group's step,
and do nothing at stage 0; so the tensors are looked up here, once, and shares.py does the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mmlm.train.optimizer import Optimizer
from mmlm.train.shares import Run, Share, cut_each, cut_end_to_end
from mmlm.world import World


def shares(optimizer: Any, rules: Optimizer, names: dict[int, str], world: World) -> list[Share]:
    """The shares of this rank. `names` tells the parameters of the model by their id()."""
    spread = world.size > 1
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # ZeRO 3
        return [
            Share(
                tensor,
                rules.param_groups[optimizer.sub_group_to_group_id[i]],
                cut_each(
                    [(names[id(p)], torch.Size(p.ds_shape)) for p in parameters],
                    [p.partition_numel() for p in parameters],
                    world.rank,
                ),
                spread,
            )
            for i, (tensor, parameters) in enumerate(
                zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True)
            )
        ]
    if hasattr(optimizer, "single_partition_of_fp32_groups"):  # ZeRO 1 and 2
        return [
            Share(
                tensor,
                rules.param_groups[i],
                cut_end_to_end(
                    [(names[id(p)], p.shape) for p in optimizer.round_robin_bit16_groups[i]],
                    optimizer.round_robin_bit16_offsets[i],
                    world.rank * optimizer.partition_size[i],
                    optimizer.partition_size[i],
                ),
                spread,
            )
            for i, tensor in enumerate(optimizer.single_partition_of_fp32_groups)
        ]
    found = []
    for i, group in enumerate(rules.param_groups):  # stage 0
        models = optimizer.fp16_groups[i] if hasattr(optimizer, "fp16_groups") else group["params"]
        for own, model in zip(group["params"], models, strict=True):
            run = Run(names[id(model)], own.shape, 0, 0, own.numel())
            found.append(Share(own, group, [run], spread=False))
    return found


@torch.no_grad()
def refresh(optimizer: Any) -> None:
    """Let the weights that the forward pass reads follow the float32 ones that were just set."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        optimizer.empty_partition_cache()  # a pass without a backward one leaves weights gathered, for the next to read
        for number, full in enumerate(optimizer.fp32_partitioned_groups_flat):
            optimizer.fp16_partitioned_groups_flat[number].data.copy_(full.data)
            optimizer._unflatten_partitioned_parameters(number)
    elif hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()
    elif hasattr(optimizer, "fp16_groups"):
        for low, full in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for a, b in zip(low, full, strict=True):
                a.data.copy_(b.data)


def loss_scale(optimizer: Any) -> float:
    return float(getattr(optimizer, "loss_scale", 1.0))


SCALER = ("cur_scale", "cur_iter", "last_overflow_iter")


def scaler_state(optimizer: Any) -> dict[str, float]:
    """State of fp16's dynamic loss scale; empty for other precisions."""
    scaler = _scaler(optimizer)
    return {f"scaler.{name}": float(getattr(scaler, name)) for name in SCALER} if scaler else {}


def set_scaler_state(optimizer: Any, scalars: Mapping[str, float]) -> None:
    scaler = _scaler(optimizer)
    if scaler:
        scaler.cur_scale = scalars["scaler.cur_scale"]
        scaler.cur_iter = int(scalars["scaler.cur_iter"])
        scaler.last_overflow_iter = int(scalars["scaler.last_overflow_iter"])


def _scaler(optimizer: Any) -> Any:
    scaler = getattr(optimizer, "loss_scaler", None) or getattr(optimizer, "loss_scale_config", None)
    return scaler if getattr(scaler, "last_overflow_iter", None) is not None else None
