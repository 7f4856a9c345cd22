"""Sub-layers whose gradients are written by hand, since what is between matrix products takes a third of a step on a CPU.

Forward and backward on one core (AVX-512, torch 2.13), bf16, 4,096 positions: RMSNorm over 512 values 4.4 ms against 9.3,
SwiGLU of 1,376 values 8.0 ms against 14.2 (the linear maps around it: 130). Their library forms convert to float32 and
back, and put halves together again, in passes of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

EPSILON = 1e-6
"""Added to the mean square, unless told otherwise: the same in every precision; the library's default in bf16 is 0.0078."""
FEW = 1 << 14
"""Values: the library's forms are the faster ones for so few, as in a step of generation, where a call costs more than its
work (RMSNorm of 768 values: 19 µs against 47)."""
LONG = 1e9
"""Rows times the square of their width. From here on a map (768 to 2,304: 8 ms) takes as long in one layer as to compile it."""


def plain(x: torch.Tensor) -> bool:
    """Whether the library's forms are to be taken: on a GPU, and where blocks are compiled. The compiler makes one kernel of
    them; at results written into halves of a tensor it gives up, and keeps the first batch's sizes for those that follow."""
    return x.is_cuda or torch.compiler.is_compiling()


class RMSNorm(nn.RMSNorm):
    """x / √(mean(x²) + ε) · w over the last axis (Zhang & Sennrich 2019)."""

    def __init__(self, width: int, epsilon: float = EPSILON) -> None:
        super().__init__(width, eps=epsilon)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if plain(x) or (x.numel() <= FEW and not torch.is_grad_enabled()):
            return super().forward(x)
        return _Norm.apply(x, self.weight, self.eps)


class _Norm(torch.autograd.Function):
    """Statistics in float32, everything else in the type of `x`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
        inverse = norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return torch.mul(x, inverse, out=torch.empty_like(x)).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """dx = r (g w - x r² mean(g w x)) and dw = Σ g x r, with r the inverse root mean square."""
        x, weight, inverse = ctx.saved_tensors
        g = gradients[0]
        gx = (g * x).flatten(0, -2).to(inverse.dtype)  # float32: a product with a vector compiles nothing (see `rung`)
        along = (gx @ weight.to(gx.dtype)).view(inverse.shape) * inverse**3 / -x.shape[-1]
        dw = gx.T.mv(inverse.flatten()).to(weight.dtype)
        dx = torch.mul(g, weight)
        dx = torch.mul(dx, inverse, out=dx).addcmul_(x, along.to(x.dtype))
        return dx, dw, None


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """SiLU(x G) · (x U) of both halves side by side (Shazeer 2020, eq. 6)."""
    if plain(gate_up) or not torch.is_grad_enabled():
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up
    return _SwiGLU.apply(gate_up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, -1)
        active = F.silu(gate)
        ctx.save_for_backward(gate_up, active)
        return active * up

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        gate_up, active = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        made = torch.empty_like(gate_up)
        dgate, dup = made.chunk(2, -1)
        torch.mul(gradients[0], active, out=dup)
        torch.ops.aten.silu_backward.grad_input(gradients[0] * up, gate, grad_input=dgate)
        return made


def turned(x_XNH: torch.Tensor, cos_X1C: torch.Tensor, sin_X1C: torch.Tensor) -> torch.Tensor:
    """Both halves of the last axis as real and imaginary parts, turned by an angle; C = H/2. bf16, 3,392 positions, 24 heads
    of 64: 15 ms forward and backward against 20 to 30 of products and differences that are put together again."""
    if not plain(x_XNH):
        return _Turned.apply(x_XNH, cos_X1C, sin_X1C)
    a, b = x_XNH.chunk(2, -1)
    return torch.cat([a * cos_X1C - b * sin_X1C, a * sin_X1C + b * cos_X1C], -1)


class _Turned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return _turn(gradients[0], cos, sin, -1), None, None


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, way: int) -> torch.Tensor:
    (a, b), y = x.chunk(2, -1), x.new_empty(x.shape)
    real, imaginary = y.chunk(2, -1)
    torch.mul(a, cos, out=real).addcmul_(b, sin, value=-way)
    torch.mul(b, cos, out=imaginary).addcmul_(a, sin, value=way)
    return y


def rung(x: torch.Tensor, count: int) -> int:
    """`count` rows of `x` rounded up to one of 8 numbers an octave, where products of that many rows have to be compiled.

    For low precision on a CPU, oneDNN compiles a kernel for each shape that it meets: 0.4 to 4 ms, as long as the product
    of a small model itself takes, and the numbers of positions, answers and patches are others in every step. With this, and
    small groups attended in float32 (packed.py), the forward and backward pass of the demo's teacher take 66 ms of one core
    instead of 105, those of `almanac` 338 instead of 556 (with 16 an octave; with 8 there are 204 shapes in 110 steps of
    `almanac` and not 292, which saves as much time as the further rows take, and memory: mmlm/train/memory.py).
    """
    return count if x.is_cuda or x.dtype not in (torch.bfloat16, torch.float16) else rung_of(count, x.shape[-1])


def rung_of(count: int, width: int) -> int:
    """That number, for rows of `width` values."""
    step = max(32, (1 << max(count - 1, 1).bit_length()) // 16 if count * width**2 < LONG else 0)
    return -(-count // step) * step


def rounded(x: torch.Tensor) -> torch.Tensor:
    """With rows of zeros up to the next rung."""
    more = rung(x, len(x)) - len(x)
    return F.pad(x, (0, 0, 0, more)) if more else x


def rows_of(x_XD: torch.Tensor, at_U: torch.Tensor) -> torch.Tensor:
    """x[at], for rows that are named at most once: their gradient is put back without adding up."""
    return _Rows.apply(x_XD, at_U)


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_XD: torch.Tensor, at_U: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(at_U)
        ctx.shape = x_XD.shape
        return x_XD.index_select(0, at_U)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (at_U,) = ctx.saved_tensors
        return gradients[0].new_zeros(ctx.shape).index_copy_(0, at_U, gradients[0]), None
