"""Rotary frequencies that were stretched to reach further than a model was trained: what pretrained models come with."""

from __future__ import annotations

import functools
import math

import torch

from mmlm.model.config import LinearScaling, Llama3Scaling, RopeScaling, YarnScaling


def frequencies(head_width: int, theta: float, scaling: RopeScaling | None, device: torch.device | str) -> torch.Tensor:
    """Radians a position of each pair of values, (H/2,) float32, computed there as well."""
    plain = _plain(head_width, theta, str(device))
    if isinstance(scaling, LinearScaling):
        return plain / scaling.factor
    if isinstance(scaling, Llama3Scaling):
        return _llama3(plain, scaling)
    if isinstance(scaling, YarnScaling):
        return _yarn(plain, head_width, theta, scaling)
    return plain


@functools.cache
def _plain(head_width: int, theta: float, device: str) -> torch.Tensor:
    """Made once: a step of generation would spend 3 % of its time on it."""
    with torch.inference_mode(False):  # whoever comes first, it is fit for training
        return theta ** (-torch.arange(0, head_width, 2, device=device, dtype=torch.float32) / head_width)


def magnitude(scaling: RopeScaling | None) -> float:
    """What cos and sin are multiplied by: of YaRN √(1/t), which makes the softmax sharper (Peng et al. 2023, eq. 22)."""
    if not isinstance(scaling, YarnScaling):
        return 1.0
    if scaling.magnitude is not None:
        return scaling.magnitude
    return 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0


def _llama3(plain: torch.Tensor, scaling: Llama3Scaling) -> torch.Tensor:
    """Long waves are stretched, short ones stay, and between the two borders the share moves linearly with the number of
    turns in the trained length."""
    turns = scaling.trained_length * plain / (2 * math.pi)
    kept = ((turns - scaling.low_turns) / (scaling.high_turns - scaling.low_turns)).clamp(0, 1)
    return plain * (kept + (1 - kept) / scaling.factor)


def _yarn(plain: torch.Tensor, head_width: int, theta: float, scaling: YarnScaling) -> torch.Tensor:
    """ "NTK by parts" (Peng et al. 2023, section 3.2), with the border between the parts linear in the number of the pair,
    as the authors' program has it and released models were trained with."""

    def pair(turns: float) -> float:
        """The pair that turns so often in the trained length."""
        return head_width * math.log(scaling.trained_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(scaling.fast_turns), pair(scaling.slow_turns)
    if scaling.whole_pairs:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_width - 1)
    number = torch.arange(len(plain), device=plain.device, dtype=torch.float32)
    stretched = ((number - low) / max(high - low, 0.001)).clamp(0, 1)
    return plain * (1 - stretched + stretched / scaling.factor)
