"""Beam search against brute force on three words."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from mmlm.data.collate import collate, field_rows
from mmlm.features.sample import Sample
from mmlm.features.spec import EOS
from mmlm.model.config import ModelConfig
from mmlm.model.generation import generate
from mmlm.model.generation_config import GenerationConfig
from mmlm.model.sampling import words_only
from mmlm.model.transformer import FusedTransformer
from tests.small import SPEC, sample

TINY = SPEC.model_copy(update={"vocab_size": 12})
WORDS = (9, 10, 11)


def tiny(seed: int) -> tuple[FusedTransformer, list[Sample]]:
    torch.manual_seed(seed)
    net = FusedTransformer(ModelConfig(width=32, layers=2, heads=4), TINY, len(field_rows(TINY))).eval()
    net.answer.weight.data *= 10
    samples = [sample(i, given) for i, given in enumerate([("image",), ("audio", "fields"), ()])]
    for one in samples:
        one.tokens = np.where(one.tokens > 11, 9 + one.tokens % 3, one.tokens).astype(np.int32)
    return net, samples


def asked(samples: list[Sample]) -> Any:
    return collate(samples, TINY, pad_left=True, with_answer=False)


def log_of(net: FusedTransformer, one: Sample, ids: tuple[int, ...]) -> float:
    """The log-probability of a whole answer, <eos> included, by one full pass."""
    tokens = [*one.tokens[: one.answer_at + 1].tolist(), *ids, EOS]
    whole = Sample(**{**{f: getattr(one, f) for f in Sample.__slots__}, "tokens": np.array(tokens)})
    log_AV = words_only(net(collate([whole], TINY)).answer_AV).log_softmax(-1)
    return float(log_AV[torch.arange(len(ids) + 1), [*ids, EOS]].sum())


@pytest.mark.parametrize("power", [1.0, 0.0, 2.5])
@pytest.mark.parametrize("seed", range(2))
def test_enough_beams_find_the_best_of_all_answers(seed: int, power: float) -> None:
    net, samples = tiny(seed)
    limit, config = 4, GenerationConfig(beams=64, length_penalty=power)
    found = generate(net, asked(samples), limit, config)
    for one, ids, log in zip(samples, found.ids, found.log_score_R.tolist(), strict=True):
        every = [ids for n in range(limit) for ids in itertools.product(WORDS, repeat=n)]
        with torch.no_grad():
            logs = {ids: log_of(net, one, ids) for ids in every}
        best = max(every, key=lambda ids: logs[ids] / (len(ids) + 1) ** power)
        assert tuple(ids) == best
        assert log == pytest.approx(logs[best], abs=1e-4)


def by_hand(net: FusedTransformer, one: Sample, limit: int, beams: int) -> tuple[int, ...]:
    """Beam search by full passes, in its plainest form."""
    open_: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    ended: list[tuple[tuple[int, ...], float]] = []
    for _ in range(limit):
        tried: list[tuple[tuple[int, ...], float]] = []
        for ids, log in open_:
            tokens = [*one.tokens[: one.answer_at + 1].tolist(), *ids, EOS]
            whole = Sample(**{**{f: getattr(one, f) for f in Sample.__slots__}, "tokens": np.array(tokens)})
            last_V = words_only(net(collate([whole], TINY)).answer_AV[-1]).log_softmax(-1)
            tried += [((*ids, token), log + float(last_V[token])) for token in (EOS, *WORDS)]
        tried.sort(key=lambda pair: -pair[1])
        open_ = []
        better: list[tuple[tuple[int, ...], float]] = []
        for ids, log in tried:
            if len(open_) < beams:
                (better if ids[-1] == EOS else open_).append((ids, log))
        ended += better
        worth = sorted((log / len(ids) for ids, log in ended), reverse=True)
        if len(ended) >= beams and max(log / len(ids) for ids, log in open_) <= worth[beams - 1]:
            break
    best = max(ended or open_, key=lambda pair: pair[1] / len(pair[0]))[0]
    return best[:-1] if ended else best


@pytest.mark.parametrize("beams", [2, 3])
def test_few_beams_find_what_the_plain_search_finds(beams: int) -> None:
    differs = 0
    for seed in range(3):
        net, samples = tiny(seed)
        found = generate(net, asked(samples), 6, GenerationConfig(beams=beams)).ids
        with torch.no_grad():
            assert [tuple(ids) for ids in found] == [by_hand(net, one, 6, beams) for one in samples]
        assert found == [generate(net, asked([one]), 6, GenerationConfig(beams=beams)).ids[0] for one in samples]
        differs += found != generate(net, asked(samples), 6).ids
    assert differs, "beams must make a difference somewhere"


def test_beams_keep_to_the_penalty_of_repetition() -> None:
    net, samples = tiny(1)
    plain = generate(net, asked(samples), 8, GenerationConfig(beams=4)).ids
    punished = generate(net, asked(samples), 8, GenerationConfig(beams=4, repetition_penalty=100)).ids
    assert plain != punished
    assert all(len(set(ids)) == len(ids) for ids in punished if len(ids) <= 3)
