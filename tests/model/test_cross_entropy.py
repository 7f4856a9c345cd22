"""The loss made piece by piece against the plain one."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F
from torch.profiler import profile

from mmlm.model import cross_entropy
from mmlm.model.cross_entropy import AnswerHead, Lead


def plain(head: AnswerHead, x: torch.Tensor, target: torch.Tensor, z: float) -> torch.Tensor:
    logits = head(x).float() if x.dtype == torch.bfloat16 else head(x)
    return F.cross_entropy(logits, target, reduction="sum") + z * logits.logsumexp(-1).square().sum()


@pytest.mark.parametrize("z", [0.0, 1e-2])
@pytest.mark.parametrize("limit", [50, 7 * 50, 1 << 20])  # pieces of 1 and of 7 rows, and one piece
def test_values_and_gradients_equal_the_plain_ones(z: float, limit: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cross_entropy, "LOGITS", limit)
    torch.manual_seed(0)
    head = AnswerHead(16, 50).double()
    x = torch.randn(30, 16, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 50, (30,))
    loss = head(x, target, z)
    wanted = plain(head, x, target, z)
    assert loss.sum.item() == pytest.approx(wanted.item(), rel=1e-12)
    assert torch.allclose(loss.each_A, F.cross_entropy(head(x), target, reduction="none"))
    assert torch.allclose(loss.log_z_A, head(x).logsumexp(-1))
    made = torch.autograd.grad(0.3 * loss.sum, (x, head.weight))
    for a, b in zip(made, torch.autograd.grad(0.3 * wanted, (x, head.weight)), strict=True):
        assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("task", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("z", [0.0, 1e-2])
@pytest.mark.parametrize("limit", [50, 7 * 100, 1 << 20])
def test_a_teachers_word_is_followed_piece_by_piece(task: float, z: float, limit: int, monkeypatch: pytest.MonkeyPatch):
    """Against the formulas on whole logits, with a teacher of another width."""
    monkeypatch.setattr(cross_entropy, "LOGITS", limit)
    torch.manual_seed(0)
    head, leader = AnswerHead(16, 50).double(), AnswerHead(24, 50).double()
    x = torch.randn(30, 16, dtype=torch.float64, requires_grad=True)
    states, target, T = 3 * torch.randn(30, 24, dtype=torch.float64), torch.randint(0, 50, (30,)), 2.5
    loss = head(x, target, z, lead=Lead(states, leader, T, task))
    logits, led = head(x), leader(states).detach()
    q = (led / T).softmax(-1)
    kl = T**2 * (q * (q.log() - (logits / T).softmax(-1).log())).sum()
    answer = F.cross_entropy(logits, target, reduction="sum")
    wanted = task * answer + z * logits.logsumexp(-1).square().sum() + kl
    assert loss.kl.item() == pytest.approx(kl.item(), rel=1e-12)
    assert loss.each_A.sum().item() == pytest.approx(answer.item(), rel=1e-12)
    assert loss.sum.item() == pytest.approx(wanted.item(), rel=1e-12)
    made = torch.autograd.grad(0.3 * loss.sum, (x, head.weight))
    for a, b in zip(made, torch.autograd.grad(0.3 * wanted, (x, head.weight)), strict=True):
        assert torch.allclose(a, b, atol=1e-12)
    assert leader.weight.grad is None


def test_bfloat16_gradients_are_nearly_as_good_as_the_plain_ones(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    head, x, target = AnswerHead(64, 500), torch.randn(300, 64), torch.randint(0, 500, (300,))
    x.requires_grad_()
    exact = torch.autograd.grad(plain(head, x, target, 0.0), (x, head.weight))
    low, y = AnswerHead(64, 500).bfloat16(), x.detach().bfloat16().requires_grad_()
    low.load_state_dict(head.state_dict())
    monkeypatch.setattr(cross_entropy, "LOGITS", 500 * 40)
    made = torch.autograd.grad(low(y, target).sum, (y, low.weight))
    usual = torch.autograd.grad(plain(low, y, target, 0.0), (y, low.weight))
    for right, ours, theirs in zip(exact, made, usual, strict=True):
        assert (ours - right).norm() <= 1.25 * (theirs - right).norm()


def test_no_rows_and_no_gradients():
    head = AnswerHead(8, 20)
    loss = head(torch.zeros(0, 8, requires_grad=True), torch.zeros(0, dtype=torch.int64))
    loss.sum.backward()
    assert loss.sum.item() == 0 and head.weight.grad is not None and not head.weight.grad.any()
    with torch.no_grad():
        assert head(torch.randn(3, 8), torch.tensor([1, 2, 3])).sum.isfinite()


PEAK = """
import sys, torch
from mmlm.model.cross_entropy import AnswerHead, Lead
from torch.nn import functional as F
torch.set_num_threads(1)
def peak():  # kB; ru_maxrss would be that of the process that started this one
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
head, x = AnswerHead(32, 32_000), torch.randn(2_048, 32, requires_grad=True)
target = torch.randint(0, 32_000, (2_048,))
before = peak()
lead = Lead(torch.randn(2_048, 48), AnswerHead(48, 32_000), 2.0, 0.5)
if sys.argv[1] == "plain":
    loss = F.cross_entropy(head(x), target, reduction="sum")
else:
    loss = head(x, target, lead=lead if sys.argv[1] == "led" else None).sum
loss.backward()
print(peak() - before)
"""


def test_the_logits_of_a_large_vocabulary_never_exist_whole():
    """2,048 positions of 32,000 logits are 262 MB in float32, and their gradient as much again."""
    peak = {}
    for name in ("pieces", "led", "plain"):
        done = subprocess.run([sys.executable, "-c", PEAK, name], capture_output=True, text=True, check=True)
        peak[name] = int(done.stdout) / 1e3  # MB
    assert peak["plain"] > 500
    assert peak["pieces"] < 220 and peak["led"] < 320


def test_a_loss_without_gradients_makes_none():
    head, x, target = AnswerHead(16, 5_000), torch.randn(64, 16), torch.randint(0, 5_000, (64,))
    with torch.no_grad(), profile() as seen:
        loss = head(x, target)
    assert loss.sum.item() == pytest.approx(plain(head, x, target, 0.0).item(), rel=1e-5)
    assert not [row for row in seen.key_averages() if row.key in ("aten::scatter_add_", "aten::exp_")]
