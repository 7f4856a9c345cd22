"""What is drawn, against literal transcriptions of the definitions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mmlm.config import parse
from mmlm.errors import ConfigError
from mmlm.features.spec import EOS
from mmlm.model.generation_config import GenerationConfig
from mmlm.model.sampling import drawn, penalised, shares, words_only

V = 40


def logits(seed: int, rows: int = 6) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 2, (rows, V)))


def literal(row: np.ndarray, temperature: float, top_k: int | None, top_p: float, min_p: float) -> np.ndarray:
    """Token by token, in the words of the papers."""
    weights = {i: float(np.exp(row[i] / temperature)) for i in range(len(row))}
    falling = sorted(weights, key=lambda i: -weights[i])
    kept = falling[: top_k or len(falling)]
    total, mass, nucleus = sum(weights[i] for i in kept), 0.0, []
    for i in kept:  # the smallest set whose probability is at least top_p
        nucleus.append(i)
        mass += weights[i] / total
        if mass >= top_p:
            break
    total = sum(weights[i] for i in nucleus)
    most = max(weights[i] / total for i in nucleus)
    final = [i for i in nucleus if weights[i] / total >= min_p * most]
    total = sum(weights[i] for i in final)
    return np.array([weights[i] / total if i in final else 0.0 for i in range(len(row))])


CASES: list[dict[str, Any]] = [
    {"temperature": 0.7},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 1.3, "top_k": 1000},
    {"temperature": 1.0, "top_p": 0.6},
    {"temperature": 2.0, "top_p": 0.999},
    {"temperature": 1.0, "top_p": 1e-6},
    {"temperature": 1.0, "min_p": 0.2},
    {"temperature": 1.5, "min_p": 1.0},
    {"temperature": 0.9, "top_k": 12, "top_p": 0.8, "min_p": 0.1},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_shares_are_those_of_the_definitions(case: dict[str, Any]) -> None:
    x_BV = logits(1)
    share_BW, token_BW = shares(x_BV, GenerationConfig(**case))
    whole = torch.zeros_like(x_BV)
    whole = share_BW if token_BW is None else whole.scatter(1, token_BW, share_BW)
    settings: dict[str, Any] = {"top_k": None, "top_p": 1.0, "min_p": 0.0, **case}
    for row, found in zip(x_BV.numpy(), whole.numpy(), strict=True):
        np.testing.assert_allclose(found, literal(row, **settings), atol=1e-9)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tokens_are_drawn_as_often_as_their_shares_say(case: dict[str, Any]) -> None:
    config, times = GenerationConfig(**case), 4000
    x_BV = logits(2, 1)
    uniform = ((np.arange(times) + 0.5) / times).tolist()
    counts = np.bincount(drawn(x_BV.expand(times, V), config, uniform).numpy(), minlength=V) / times
    settings: dict[str, Any] = {"top_k": None, "top_p": 1.0, "min_p": 0.0, **case}
    np.testing.assert_allclose(counts, literal(x_BV[0].numpy(), **settings), atol=1 / times + 1e-9)


@pytest.mark.parametrize("temperature", [1e-30, 1e-38, 1e-45, 1e-300])
@pytest.mark.parametrize("case", [{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}], ids=str)
def test_the_smallest_temperatures_draw_the_most_probable_token(temperature: float, case: dict[str, Any]) -> None:
    x_BV = torch.tensor([[1.0, 5.0, 3.0, 2.0], [-9.0, -torch.inf, -3.0, -torch.inf]])
    config = GenerationConfig(temperature=temperature, **case)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert drawn(x_BV.to(dtype), config, [0.999, 0.999]).tolist() == [1, 2]
        share_BW, _ = shares(x_BV.to(dtype), config)
        assert (share_BW.amax(-1) == 1).all() and (share_BW.sum(-1) == 1).all()


def test_the_ends_of_the_interval_are_tokens_that_may_be_drawn() -> None:
    x_BV = torch.tensor([[-torch.inf, 1.0, -torch.inf, 2.0, -torch.inf]]).expand(2, 5)
    for case in ({}, {"top_k": 4}, {"top_p": 0.9999999}):
        found = drawn(x_BV, GenerationConfig(temperature=1.0, **case), [0.0, 1 - 2**-53]).tolist()  # type: ignore[arg-type]
        assert sorted(found) == [1, 3]


def test_the_penalty_is_that_of_the_definition() -> None:
    x_BV, given = logits(3, 3), [[4, 4, 9], [], [0]]
    found = penalised(x_BV, given, 1.7)
    for b in range(3):
        for i in range(V):
            x = float(x_BV[b, i])
            wanted = (x / 1.7 if x > 0 else x * 1.7) if i in given[b] else x
            assert float(found[b, i]) == pytest.approx(wanted, abs=1e-12)
    assert penalised(x_BV, given, 1.0) is x_BV


def test_no_mark_but_the_end_is_a_word() -> None:
    finite = torch.isfinite(words_only(logits(4)))
    assert finite[:, EOS].all() and finite[:, 9:].all()
    assert int(finite.sum(1)[0]) == V - 8


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"temperature": -1}, "greater than or equal to 0"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.5}, "temperature above 0"),
        ({"top_k": 0, "temperature": 1}, "top_k"),
        ({"top_p": 0, "temperature": 1}, "top_p"),
        ({"beams": 4, "temperature": 1}, "leave temperature at 0"),
        ({"length_penalty": 0.5}, "beams above 1"),
        ({"choices": ["a"], "json_schema": {}}, "one of them"),
        ({"stop": [""]}, "stop"),
        ({"stop": "x"}, "stop"),
        ({"seed": -1}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temprature": 1}, "did you mean `temperature`"),
    ],
)
def test_settings_that_mean_nothing_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse(GenerationConfig, given, "generation")
