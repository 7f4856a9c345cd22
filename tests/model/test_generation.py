"""Generation with a cache against the full forward pass, and each record against its neighbours."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from mmlm.data.collate import collate, field_rows
from mmlm.features.sample import Sample
from mmlm.features.spec import EOS
from mmlm.model.attention import Cache
from mmlm.model.config import ModelConfig
from mmlm.model.generation import closed_up, generate
from mmlm.model.generation_config import GenerationConfig
from mmlm.model.layouts import build_model
from mmlm.model.sampling import drawn, penalised, words_only
from mmlm.model.transformer import FusedTransformer
from tests.small import SPEC, sample

GIVEN = [("image", "audio"), ("audio",), (), ("fields", "context"), ("image",), ("context",)]
LIMIT = 12


def model(attention: str = "prefix", **changes: Any) -> FusedTransformer:
    """One whose next tokens differ in probability, and that ends some answers early."""
    torch.manual_seed(1)
    config = ModelConfig(**{"width": 32, "layers": 2, "heads": 4, "attention": attention, **changes})
    net = build_model(config, SPEC, len(field_rows(SPEC))).eval()
    net.answer.weight.data *= 12
    net.answer.weight.data[EOS] *= 1.5
    return net


def prompts(samples: list[Sample]) -> Any:
    return collate(samples, SPEC, pad_left=True, with_answer=False)


def asked() -> list[Sample]:
    return [sample(i, given) for i, given in enumerate(GIVEN)]


SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_k": 5},
    {"temperature": 1.2, "top_p": 0.7},
    {"temperature": 1.5, "min_p": 0.1},
    {"repetition_penalty": 1.5},
    {"temperature": 1.0, "repetition_penalty": 1.3, "top_k": 20, "top_p": 0.95, "min_p": 0.02},
]


def by_full_passes(net: FusedTransformer, one: Sample, config: GenerationConfig, seed: int) -> tuple[list[int], float]:
    """An answer and its log-probability without a cache: all of the sequence is computed for each token."""
    random, total = np.random.Generator(np.random.Philox(seed)), 0.0
    ids: list[int] = []
    for _ in range(LIMIT):
        so_far = [*one.tokens[: one.answer_at + 1].tolist(), *ids, EOS]
        whole = Sample(**{**{f: getattr(one, f) for f in Sample.__slots__}, "tokens": np.array(so_far)})
        logits_1V = words_only(net(collate([whole], SPEC)).answer_AV[-1:])
        changed = penalised(logits_1V, [ids], config.repetition_penalty)
        token = int(drawn(changed, config, [random.random()]) if config.temperature else changed.argmax(-1))
        total += float(logits_1V.log_softmax(-1)[0, token])
        if token == EOS:
            break
        ids.append(token)
    return ids, total


def compared(net: FusedTransformer, config: GenerationConfig) -> list[list[int]]:
    """The answers, which are those of full passes."""
    samples = asked()
    seeds = list(range(100, 100 + len(samples)))
    with torch.no_grad():
        wanted = [by_full_passes(net, one, config, seed) for one, seed in zip(samples, seeds, strict=True)]
    found = generate(net, prompts(samples), LIMIT, config, seeds=seeds)
    assert found.ids == [ids for ids, _ in wanted]
    assert found.log_score_R.tolist() == pytest.approx([total for _, total in wanted], abs=1e-3)
    return found.ids


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("changes", [{}, {"attention": "causal", "kv_heads": 2, "qk_norm": True}], ids=str)
def test_every_token_is_that_of_the_full_pass(settings: dict[str, Any], changes: dict[str, Any]) -> None:
    lengths = [len(ids) for ids in compared(model(**changes), GenerationConfig(**settings))]
    assert min(lengths) < max(lengths), "some answers must leave before others"


FORMS: list[dict[str, Any]] = [
    {"fusion": {"kind": "add"}},
    {"fusion": {"kind": "cross_attention"}},
    {"fusion": {"kind": "adversarial"}},
    {"fusion": {"kind": "late"}},
    *({"layout": "encoder_decoder", "fusion": kind} for kind in ("concat", "add", "cross_attention", "late")),
]


@pytest.mark.parametrize("settings", [SETTINGS[0], SETTINGS[-1]], ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_so_it_is_in_every_form(settings: dict[str, Any], form: dict[str, Any]) -> None:
    assert any(compared(model(**form), GenerationConfig(**settings)))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_beam_does_not_depend_on_its_neighbours_in_any_form(form: dict[str, Any]) -> None:
    net, samples, config = model(**form), asked(), GenerationConfig(beams=3)
    together = generate(net, prompts(samples), LIMIT, config)
    for n, one in enumerate(samples):
        alone = generate(net, prompts([one]), LIMIT, config)
        assert alone.ids[0] == together.ids[n]
        assert alone.log_score_R.item() == pytest.approx(together.log_score_R[n].item(), abs=1e-3)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_what_is_kept_in_another_type_is_as_good_as_the_full_pass_in_bf16(kv_heads: int) -> None:
    """Both against the same weights in float32: the cache must not be the coarser of the two."""
    net, samples = model(kv_heads=kv_heads).bfloat16(), asked()
    found = generate(net, prompts(samples), LIMIT)
    errors = []
    for one in (net, copy.deepcopy(net).float()):
        totals = []
        for asker, ids in zip(samples, found.ids, strict=True):
            whole = [*asker.tokens[: asker.answer_at + 1].tolist(), *ids, EOS]
            fields = {**{f: getattr(asker, f) for f in Sample.__slots__}, "tokens": np.array(whole)}
            with torch.no_grad():
                log_AV = words_only(one(collate([Sample(**fields)], SPEC)).answer_AV.float()).log_softmax(-1)
            told = [*ids, EOS][: LIMIT if len(ids) == LIMIT else len(ids) + 1]
            totals.append(sum(float(log_AV[n, token]) for n, token in enumerate(told)))
        errors.append(totals)
    low, exact = (torch.tensor(totals) for totals in errors)
    assert (found.log_score_R - exact).abs().max() <= max(2 * float((low - exact).abs().max()), 0.05)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_an_answer_does_not_depend_on_its_neighbours(settings: dict[str, Any]) -> None:
    net, config, samples = model(), GenerationConfig(**settings), asked()
    seeds = [7, 7, 8, 9, 10, 7]
    together = generate(net, prompts(samples), LIMIT, config, seeds=seeds)
    for n, one in enumerate(samples):
        alone = generate(net, prompts([one]), LIMIT, config, seeds=[seeds[n]])
        assert alone.ids[0] == together.ids[n]
        assert alone.log_score_R.item() == pytest.approx(together.log_score_R[n].item(), abs=1e-3)
    order = [3, 0, 5, 1]
    some = generate(net, prompts([samples[n] for n in order]), LIMIT, config, seeds=[seeds[n] for n in order])
    assert some.ids == [together.ids[n] for n in order]


def test_seeds_decide_what_is_drawn() -> None:
    net, config = model(), GenerationConfig(temperature=1.0)
    one = [sample(1)] * 8
    same = generate(net, prompts(one), LIMIT, config, seeds=[5] * 8).ids
    assert all(ids == same[0] for ids in same)
    assert len({tuple(ids) for ids in generate(net, prompts(one), LIMIT, config, seeds=list(range(8))).ids}) > 4


def test_answers_that_have_ended_cost_nothing() -> None:
    net, sizes = model(), list[int]()
    net.tokens.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    ids = generate(net, prompts(asked()), LIMIT).ids
    sizes = sizes[1:]  # the first are all tokens of the prompts
    passes = [min(len(one) + 1, LIMIT) - 1 for one in ids]  # the first token comes from the prompt
    assert sum(sizes) == sum(passes) and len(sizes) == max(passes)
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < sizes[0]


def test_a_long_answer_outgrows_the_cache() -> None:
    net = model("causal")
    net.answer.weight.data[EOS] = 0
    config = GenerationConfig(repetition_penalty=1.2)
    found = generate(net, prompts([sample(1), sample(2, ())]), 150, config)
    assert [len(ids) for ids in found.ids] == [150, 150]
    one = sample(1)
    one.tokens = np.array([*one.tokens[: one.answer_at + 1].tolist(), *found.ids[0], EOS])
    out = words_only(net(collate([one], SPEC)).answer_AV)[:150].detach()
    ids = found.ids[0]
    best = [int(penalised(out[n : n + 1], [ids[:n]], 1.2).argmax()) for n in range(150)]
    assert best == ids


@pytest.mark.parametrize(
    ("going", "kept"), [([0, 2, 3, 5], [0, 5, 2, 3]), ([3], [3]), ([0, 1], [0, 1]), ([1, 2], [2, 1])]
)
def test_holes_are_filled_from_the_end(going: list[int], kept: list[int]) -> None:
    assert closed_up(going) == kept


@pytest.mark.parametrize("rows", [[0, 5, 2, 3], [3], [0, 1, 2], [5, 4, 3, 2, 1, 0], [1, 1, 0, 0, 0, 4, 2, 2]])
def test_rows_of_a_cache_are_kept_as_told(rows: list[int]) -> None:
    cache = Cache(room=2)
    valid_BT = torch.ones(6, 3, dtype=torch.bool)
    valid_BT[2, 0] = False
    cache.fill(torch.randn(17, 2, 4), torch.randn(17, 2, 4), valid_BT)
    for _ in range(3):
        cache.append(torch.randn(6, 2, 4), torch.randn(6, 2, 4))
    cache.aside["seen"] = torch.arange(6.0)
    keys, values = cache.keys[:, :, :6].clone(), cache.values[:, :, :6].clone()
    cache.keep(rows)
    assert torch.equal(cache.keys[:, :, :6], keys[rows]) and torch.equal(cache.values[:, :, :6], values[rows])
    assert cache.aside["seen"].tolist() == rows
    assert not keys[2, :, 0].any(), "padding holds zeros"
