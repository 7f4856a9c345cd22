"""Attention of packed records against the textbook formula under a mask of the whole batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmlm.model.packed import (
    FLEX,
    QUERIES,
    Flex,
    Grouped,
    Varlen,
    arrange,
    arrange_both_ways,
    block_kinds,
    lengths_of,
    records_of,
    similar,
)


def layout(lengths: list[list[int]], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(segment_BT, prompt_BT) of sequences of records of these lengths; about half of each record is its prompt."""
    rng = np.random.default_rng(seed)
    B, T = len(lengths), max(sum(row) for row in lengths) + 3
    segment, prompt = np.full((B, T), -1), np.zeros((B, T), bool)
    for b, row in enumerate(lengths):
        at = 0
        for n, length in enumerate(row):
            segment[b, at : at + length] = n
            prompt[b, at : at + int(rng.integers(0, length + 1))] = True
            at += length
    return torch.from_numpy(segment), torch.from_numpy(prompt)


def textbook(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segment: torch.Tensor, prompt: torch.Tensor, prefix: bool
) -> torch.Tensor:
    valid = segment >= 0
    record = (torch.arange(len(segment))[:, None] * 10_000 + segment)[valid]
    X = len(record)
    sees = torch.ones(X, X, dtype=torch.bool).tril()
    if prefix:
        sees = sees | (prompt[valid][:, None] & prompt[valid][None])
    sees = sees & (record[:, None] == record[None])
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("qnh,knh->nqk", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("nqk,knh->qnh", scores.masked_fill(~sees, -torch.inf).softmax(-1), v)


CASES = {
    "one length": [[7, 7], [7, 7]],
    "many short": [[3, 9, 5, 1, 12, 2], [8, 8, 4], [1]],
    "longer than a block": [[QUERIES + 70, 20], [2 * QUERIES + 3, 5, 40]],
    "one long": [[1100]],
}


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("case", CASES)
def test_groups_are_the_textbook_formula_and_so_are_their_gradients(case: str, kv_heads: int, prefix: bool):
    segment, prompt = layout(CASES[case])
    torch.manual_seed(0)
    X = int((segment >= 0).sum())
    q, k, v = (torch.randn(X, n, 8, dtype=torch.float64, requires_grad=True) for n in (4, kv_heads, kv_heads))
    g = torch.randn(X, 4, 8, dtype=torch.float64)
    made = Grouped.of(segment, prompt, prefix=prefix, dtype=torch.float64).attend(q, k, v)
    wanted = textbook(q, k, v, segment, prompt, prefix)
    assert torch.allclose(made, wanted, atol=1e-10)
    for a, b in zip(torch.autograd.grad(made, (q, k, v), g), torch.autograd.grad(wanted, (q, k, v), g), strict=True):
        assert torch.allclose(a, b, atol=1e-10)


@pytest.mark.parametrize("prefix", [False, True])
def test_bfloat16_is_as_near_as_its_eight_bits_allow(prefix: bool):
    segment, prompt = layout([[50, 33, 60], [QUERIES + 60]])
    torch.manual_seed(0)
    q, k, v = torch.randn(3, int((segment >= 0).sum()), 4, 16, dtype=torch.float64)
    q, k, v = (x.bfloat16() for x in (q, k, v))
    made = arrange(segment, prompt, prefix=prefix, dtype=torch.bfloat16).attend(q, k, v)
    assert made.dtype == torch.bfloat16
    wanted = textbook(q.double(), k.double(), v.double(), segment, prompt, prefix)
    assert (made.double() - wanted).abs().max() < 0.03


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_without_a_gpu_kernels_are_compiled_for_groups_that_enough_layers_use(dtype: torch.dtype):
    """Others are worked on in float32, whose kernels are ready-made."""
    segment, prompt = layout([[60] * 8, [900]])
    q = torch.zeros(int((segment >= 0).sum()), 4, 16, dtype=dtype)
    ready = torch.float32
    for layers, wanted in ((1, {60: ready, 900: ready}), (20, {60: ready, 900: dtype}), (100, {60: dtype, 900: dtype})):
        every = [arrange(segment, prompt, prefix=prefix, dtype=dtype, layers=layers) for prefix in (False, True)]
        for made in (*every, arrange_both_ways(segment, dtype=dtype, layers=layers)):
            assert isinstance(made, Grouped)
            assert {g.length: p for g, p in zip(made.groups, made.precisions(q), strict=True)}[60] == wanted[60]
        assert isinstance(every[0], Grouped)
        assert {g.length: p for g, p in zip(every[0].groups, every[0].precisions(q), strict=True)} == wanted


@pytest.mark.parametrize("prefix", [False, True])
def test_the_mask_for_flex_attention_on_a_gpu_lets_the_same_be_seen(prefix: bool):
    segment, prompt = layout([[30, 9, 70], [41, 1]])
    torch.manual_seed(0)
    q, k, v = torch.randn(3, int((segment >= 0).sum()), 2, 16)
    made = Flex.of(segment, prompt, prefix=prefix, compiled=False).attend(q, k, v)
    assert torch.allclose(made, textbook(q, k, v, segment, prompt, prefix), atol=1e-5)


@pytest.mark.parametrize("prefix", [False, True])
def test_blocks_for_flex_attention_are_those_of_the_whole_mask(prefix: bool):
    rng = np.random.default_rng(3)
    rows = [rng.integers(1, size, 9).tolist() for size in (20, 90, 300, 700)]
    segment, prompt = layout([*rows, [FLEX] * 3, [4 * FLEX]], seed=4)
    lengths, prompt_X = lengths_of(segment), prompt[segment >= 0] & prefix
    record = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    sees = torch.ones(len(record), len(record), dtype=torch.bool).tril() | (prompt_X[:, None] & prompt_X)
    sees &= record[:, None] == record
    pad = -len(record) % FLEX
    blocks = torch.nn.functional.pad(sees, (0, pad, 0, pad)).unflatten(1, (-1, FLEX)).unflatten(0, (-1, FLEX))
    some, all_ = blocks.any(3).any(1), blocks.all(3).all(1)
    partial, whole = block_kinds(lengths, prompt_X)
    assert bool((whole <= all_).all()) and not bool((partial & whole).any())
    assert torch.equal(whole, all_.tril(-1))  # what is seen wholly above the diagonal is masked for nothing, and right
    made = partial | whole
    assert torch.equal(made, some) if not prefix else bool((some <= made).all()) and made.sum() < 1.2 * some.sum()
    mask = Flex.of(segment, prompt, prefix=prefix, compiled=False).mask
    assert torch.equal(mask.to_dense()[0, 0].bool(), made)


def test_the_ends_for_flash_attention_on_a_gpu_are_those_of_the_records():
    segment, _ = layout([[30, 9, 70], [41, 1]])
    packed = Varlen.of(segment)
    assert packed.ends.tolist() == [0, 30, 39, 109, 150, 151] and packed.ends.dtype == torch.int32
    assert packed.longest == 70
    starts, lengths = records_of(segment.numpy())
    assert starts.tolist() == packed.ends[:-1].tolist() and lengths.tolist() == lengths_of(segment).tolist()


def test_groups_hold_records_of_similar_length_and_little_padding():
    lengths = np.random.default_rng(0).integers(20, 500, 200)
    groups = similar(lengths)
    assert sorted(np.concatenate(groups).tolist()) == list(range(200))
    for group in groups:
        assert lengths[group].max() - lengths[group].min() <= max(8, lengths[group].max() // 8)
    padded = sum(len(g) * int(lengths[g].max()) for g in groups)
    assert padded / lengths.sum() < 1.08
    assert len(groups) < 30


def test_no_mask_is_larger_than_a_block_of_one_record():
    segment, prompt = layout([[40] * 100])
    packed = Grouped.of(segment, prompt, prefix=True, dtype=torch.float32)
    assert sum(block.bias.numel() for group in packed.groups for block in group.blocks) == 100 * 40 * 40
    packed = Grouped.of(segment, prompt, prefix=False, dtype=torch.float32)
    assert sum(block.bias.numel() for group in packed.groups for block in group.blocks) == 40 * 40
