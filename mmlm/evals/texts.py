"""Scores of answers in words: exact match, chrF and BLEU (sacrebleu), as functions of resample weights.

chrF and BLEU run from 0 to 100, as sacrebleu gives them, pooled over records: counts of n-grams are added up over the
records, then turned into a score, so short answers do not distort it. Records of several languages are each cut into
words by the rules of their own language before they are pooled.
"""

from __future__ import annotations

import functools
import itertools
import logging
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np

from mmlm.evals.statistics import Score

FINAL_MARKS = ".!?。！？…．।؟"
"""Marks at the end of an answer that exact match ignores."""


def normalise(text: str) -> str:
    """`text` as exact match compares it: Unicode NFKC, spaces at the ends and marks at the end gone; case is kept."""
    return unicodedata.normalize("NFKC", text).strip().rstrip(FINAL_MARKS + "...").strip()


def exact_match(answers: Sequence[str], expected: Sequence[str]) -> np.ndarray:
    """(N,) bool: the answers that equal what was expected, after `normalise`."""
    return np.array([normalise(a) == normalise(e) for a, e in zip(answers, expected, strict=True)], dtype=bool)


def tokenizer_for(lang: str) -> str:
    """The sacrebleu tokenizer of a language: `zh` for Chinese, characters where words have no spaces, else `13a`."""
    base = lang.replace("-", "_").split("_")[0].lower()
    if base in ("zh", "yue", "wuu", "cmn"):
        return "zh"
    return "char" if base in ("ja", "th", "lo", "km", "my") else "13a"


@functools.cache
def _metric(name: str, tokenizer: str) -> Any:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    logging.getLogger("sacrebleu").setLevel(logging.ERROR)
    return CHRF() if name == "chrf" else BLEU(tokenize=tokenizer, effective_order=True)


def pooled(name: str, answers: Sequence[str], expected: Sequence[str], langs: Sequence[str]) -> Score:
    """Corpus `chrf` or `bleu`. The per-record counts are sacrebleu's own (what its bootstrap adds up, too)."""
    tokenizers = [tokenizer_for(lang) if name == "bleu" else "" for lang in langs]
    triples = list(zip(tokenizers, answers, expected, strict=True))
    distinct = sorted(set(triples))  # short answers repeat: each pair is counted once
    number = {triple: i for i, triple in enumerate(distinct)}
    counted: list[list[int]] = []
    for tokenizer, same in itertools.groupby(distinct, key=lambda triple: triple[0]):
        pairs = list(same)
        metric = _metric(name, tokenizer)
        counted += metric._extract_corpus_statistics([p[1] for p in pairs], [[p[2] for p in pairs]])
    counts_NS = np.array(counted, dtype=np.float64)[[number[triple] for triple in triples]]
    finish = _metric(name, "13a" if name == "bleu" else "")._compute_score_from_stats

    def score(w: np.ndarray) -> np.ndarray:
        sums = np.rint(w @ counts_NS).astype(int)
        return np.array([finish(row.tolist()).score for row in sums])

    return score
