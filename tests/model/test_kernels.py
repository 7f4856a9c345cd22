"""Gradients written by hand against numerical ones, and values against the library's."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from mmlm.model.kernels import EPSILON, RMSNorm, rows_of, swiglu


def test_rms_norm():
    torch.manual_seed(0)
    norm = RMSNorm(6).double()
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.allclose(norm(x), F.rms_norm(x, (6,), norm.weight, EPSILON), atol=1e-12)
    assert torch.autograd.gradcheck(lambda x, w: torch.func.functional_call(norm, {"weight": w}, x), (x, norm.weight))


def test_rms_norm_in_bfloat16_keeps_its_statistics_in_float32():
    x, norm = 100 * torch.randn(64, 512), RMSNorm(512)
    low = norm.bfloat16()(x.bfloat16()).double()
    wanted = F.rms_norm(x.bfloat16().double(), (512,), None, EPSILON)
    assert (low - wanted).abs().max() <= wanted.abs().max() * 2**-8


def test_swiglu():
    torch.manual_seed(0)
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    gate, up = x.chunk(2, -1)
    assert torch.allclose(swiglu(x), F.silu(gate) * up)
    assert torch.autograd.gradcheck(swiglu, (x,))


def test_rows():
    x = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    at = torch.tensor([4, 0, 5])
    assert torch.equal(rows_of(x, at), x[at])
    assert torch.autograd.gradcheck(lambda x: rows_of(x, at), (x,))
