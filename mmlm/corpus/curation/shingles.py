"""Texts → hashes of their runs of words, for many texts at once, without a Python loop over words or characters.

A word is a run of letters and digits; case, accents and compatibility forms (full-width letters) do not matter, other
characters only separate. In scripts that are written without spaces (Han, kana, Thai, Lao, Khmer, Burmese, Tibetan)
each character is a word. A run of n words has the polynomial hash Σ value(c_i)·B^i mod 2^64 over its characters, which
prefix sums give at once for every run (Karp and Rabin 1987); `value` is a random 64-bit number for each character, and
another one where a word begins, so that `a bc` and `ab c` differ.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from functools import cache

import numpy as np

U64 = np.uint64
_BASE = 0x9E3779B97F4A7C15  # odd, so that its powers have inverses mod 2^64
_START = 0xD1B54A32D192ED03
_SPREAD = 0xFF51AFD7ED558CCD
_TABLE = 0x110000
_BY_RULE = 0x20000
"""Above it there are only ideographs (planes 2 and 3) and characters that separate."""
UNSPACED = (
    (0x0E00, 0x0EFF), (0x0F00, 0x0FFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3040, 0x312F), (0x31F0, 0x31FF),
    (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x323AF),
)  # fmt: skip
"""Ranges of code points of scripts without spaces."""


@dataclass(frozen=True, slots=True)
class Shingles:
    """Hashes of the runs of n words of many texts: those of text i are `hashes[starts[i]:starts[i + 1]]`.

    A text of fewer than n words is one run; a text without words has none. Not sorted, repeated runs repeated.
    """

    hashes: np.ndarray
    """uint64"""
    starts: np.ndarray
    """int64, one more than there are texts"""
    words: np.ndarray
    """int64: how many words each text has"""


def shingles(texts: list[str], n: int) -> Shingles:
    """The runs of `n` words of every text. Takes about 40 bytes of memory per character."""
    value, kind = _tables()
    texts = [t if t.isascii() else unicodedata.normalize("NFC", t) for t in texts]
    codes = np.frombuffer("\n".join(texts).encode("utf-32-le", "surrogatepass"), dtype="<u4")
    kinds = kind[codes]
    used = np.flatnonzero(kinds)
    here = kinds[used]
    first = here == 2
    first[1:] |= (np.diff(used) > 1) | (here[:-1] == 2)
    first[:1] = True
    power, inverse = _powers(len(used) + 1)
    values = value[codes[used]]
    values[first] += U64(_START)
    values *= power[: len(used)]
    sums = np.zeros(len(used) + 1, dtype=U64)
    np.cumsum(values, out=sums[1:])
    words = np.flatnonzero(first)  # where each word begins among the used characters

    lengths = np.fromiter((len(t) for t in texts), dtype=np.int64, count=len(texts))
    begins = np.zeros(len(texts) + 1, dtype=np.int64)
    np.cumsum(lengths + 1, out=begins[1:])
    word_begins = np.searchsorted(used[words], begins)  # first word of each text
    count = np.diff(word_begins)
    runs = np.where(count > 0, np.maximum(count - n + 1, 1), 0)
    starts = np.zeros(len(texts) + 1, dtype=np.int64)
    np.cumsum(runs, out=starts[1:])
    begin = np.arange(starts[-1]) + np.repeat(word_begins[:-1] - starts[:-1], runs)
    end = np.minimum(begin + n, np.repeat(word_begins[1:], runs))
    bounds = np.append(words, len(used))
    at = bounds[begin]
    hashes = (sums[bounds[end]] - sums[at]) * inverse[at]
    hashes ^= hashes >> U64(33)
    hashes *= U64(_SPREAD)
    hashes ^= hashes >> U64(29)
    return Shingles(hashes, starts, count)


@cache
def _tables() -> tuple[np.ndarray, np.ndarray]:
    """For every code point its random value (uint64) and its kind (0 separates, 1 in a word, 2 a word by itself)."""
    folded = np.arange(_TABLE, dtype=U64)
    kind = np.zeros(_TABLE, dtype=np.uint8)
    for code in range(_BY_RULE):
        if 0xAC00 <= code <= 0xD7A3:  # Hangul syllables would fall apart into letters
            kind[code] = 1
            continue
        character = chr(code)
        if unicodedata.category(character)[0] not in "LNM" or 0x300 <= code < 0x370:
            continue
        plain = unicodedata.normalize("NFKD", character.lower())
        plain = "".join(c for c in plain if not 0x300 <= ord(c) < 0x370) or character
        folded[code] = ord(plain) if len(plain) == 1 else code
        kind[code] = 1
    for low, high in UNSPACED:
        kind[low : high + 1] = np.where(kind[low : high + 1] > 0, 2, 2 if low >= _BY_RULE else 0)
    return _mix(folded), kind


def _mix(x: np.ndarray) -> np.ndarray:
    """Numbers as if drawn at random (the finaliser of SplitMix64, Steele et al. 2014)."""
    x = (x + U64(1)) * U64(_BASE)
    x ^= x >> U64(30)
    x *= U64(0xBF58476D1CE4E5B9)
    x ^= x >> U64(27)
    x *= U64(0x94D049BB133111EB)
    x ^= x >> U64(31)
    return x


_held: list[tuple[np.ndarray, np.ndarray]] = []


def _powers(count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first powers of the base and of its inverse mod 2^64."""
    if not _held or len(_held[0][0]) < count:
        size = max(1 << 16, 1 << (count - 1).bit_length())
        made = []
        for base in (_BASE, pow(_BASE, -1, 1 << 64)):
            powers = np.full(size, base, dtype=U64)
            powers[0] = 1
            made.append(np.cumprod(powers))
        _held[:] = [(made[0], made[1])]
    return _held[0]
