"""Length and quality rules for text: those of Gopher and C4, also for scripts without spaces.

Sources: Rae et al. 2021, "Scaling Language Models: Methods, Analysis & Insights from Training Gopher"
(arXiv:2112.11446, appendix A1.1 and table A1); Raffel et al. 2020 (arXiv:1910.10683, section 2.2).
"""

from __future__ import annotations

import re
from collections import Counter

from mmlm.corpus.curation.config import QualityConfig
from mmlm.corpus.curation.words import has_unspaced, is_unspaced, tokens

STOP_WORDS = {
    "en": "the be to of and that have with",  # Gopher's
    "de": "der die das und in zu den mit ist nicht",
    "es": "de la que el en y los se por con",
    "fr": "de la le et les des en un que est",
    "it": "di che e la il un a per in non",
    "nl": "de het een van en in is dat op te",
    "pt": "de a o que e do da em um para",
    "ru": "и в не на что я с он как это",
}
"""Language → common words of which a sentence or two has some. Chinese and other unspaced scripts have no such rule."""
_STOP_WORDS = {lang: frozenset(words.split()) for lang, words in STOP_WORDS.items()}
_TOP_RUNS = {2: 0.20, 3: 0.18, 4: 0.16}
"""Table A1: words of a run → largest share of the characters that the most frequent such run may hold."""
_REPEATED_RUNS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
"""Table A1: words of a run → largest share of the characters in runs that occur more than once."""
_LINES, _LINE_CHARS, _PARAGRAPHS, _PARAGRAPH_CHARS = 0.30, 0.20, 0.30, 0.20
"""Table A1: largest shares of repeated lines, of the characters in them, and of the same for paragraphs."""
RUNS_FROM = 50
"""Words from which on runs of words are looked at: in short texts two equal runs are a large share already."""
_PER_WORD = 2
"""Characters of an unspaced script that stand for a word of a run: `图书` rather than `图`."""
_SYMBOL = re.compile(r"#|\.\.\.|…+")
_PUNCTUATION = re.compile(r"[^\w#…]+")
_BULLETS = ("•", "‣", "◦", "●", "▪", "·", "- ", "* ", "– ")
_WORD = re.compile(r"\w+")


def fault(text: str, lang: str, config: QualityConfig) -> tuple[str, str] | None:
    """(reason, detail) of the first rule that `text` (of language `lang`, "" when unknown) breaks, or None."""
    length = len(text.strip())
    if _under(length, config.min_chars):
        return "too_few_chars", f"{length:,}"
    if _over(length, config.max_chars):
        return "too_many_chars", f"{length:,}"
    found = tokens(text)
    single = sum(map(is_unspaced, found)) if has_unspaced(text) else 0
    unspaced = 2 * single > len(found)
    # a Chinese comma is no word; in spaced scripts punctuation clings to the words, and what stands alone counts
    words = [w for w in found if is_unspaced(w) or not _PUNCTUATION.fullmatch(w)] if unspaced else found
    return (
        _size(words, unspaced, config)
        or _symbols(text, words, config)
        or _stop_words(text, lang, unspaced, config)
        or _lines(text, config)
        or _banned(text, config)
        or (_repeats(text, words, unspaced) if config.repeats else None)
    )


Fault = tuple[str, str] | None


def _under(value: float, bound: float | None) -> bool:
    return bound is not None and value < bound


def _over(value: float, bound: float | None) -> bool:
    return bound is not None and value > bound


def _size(words: list[str], unspaced: bool, config: QualityConfig) -> Fault:
    if _under(len(words), config.min_words):
        return "too_few_words", f"{len(words):,}"
    if _over(len(words), config.max_words):
        return "too_many_words", f"{len(words):,}"
    if words and not unspaced:
        mean = sum(map(len, words)) / len(words)
        if _under(mean, config.min_word_length):
            return "short_words", f"{mean:.1f} characters a word"
        if _over(mean, config.max_word_length):
            return "long_words", f"{mean:.1f} characters a word"
    return None


def _symbols(text: str, words: list[str], config: QualityConfig) -> Fault:
    count = max(1, len(words))
    share = len(_SYMBOL.findall(text)) / count
    if _over(share, config.max_symbol_ratio):
        return "symbols", f"{share:.2f} a word"
    if words:
        share = sum(any(map(str.isalpha, w)) for w in words) / count
        if _under(share, config.min_alphabetic):
            return "not_alphabetic", f"{share:.2f} of the words have a letter"
    return None


def _stop_words(text: str, lang: str, unspaced: bool, config: QualityConfig) -> Fault:
    known = _STOP_WORDS.get(re.split("[-_]", lang.lower())[0])
    if not config.min_stop_words or not known or unspaced:
        return None
    have = known & set(_WORD.findall(text.lower()))
    return ("few_stop_words", f"{len(have)} of {len(known)}") if len(have) < config.min_stop_words else None


def _lines(text: str, config: QualityConfig) -> Fault:
    lines = [s for line in text.splitlines() if (s := line.strip())]
    if not lines:
        return None
    share = sum(line.startswith(_BULLETS) for line in lines) / len(lines)
    if _over(share, config.max_bullet_lines):
        return "bullets", f"{share:.2f} of the lines"
    share = sum(line.endswith(("...", "…")) for line in lines) / len(lines)
    if _over(share, config.max_ellipsis_lines):
        return "ellipses", f"{share:.2f} of the lines"
    return None


def _banned(text: str, config: QualityConfig) -> Fault:
    folded = text.casefold() if config.banned else ""
    return next((("banned", word) for word in config.banned if word.casefold() in folded), None)


def _repeats(text: str, words: list[str], unspaced: bool) -> Fault:
    size = max(1, len(text.strip()))
    for name, parts, share, chars in (
        ("lines", text.splitlines(), _LINES, _LINE_CHARS),
        ("paragraphs", re.split(r"\n\s*\n", text), _PARAGRAPHS, _PARAGRAPH_CHARS),
    ):
        filled = [p.strip() for p in parts if p.strip()]
        again = [p for p, n in Counter(filled).items() for _ in range(n - 1)]
        if len(again) > share * len(filled) or sum(map(len, again)) > chars * size:
            return f"repeated_{name}", f"{len(again)} of {len(filled)}"
    if len(words) < RUNS_FROM:
        return None
    scale = _PER_WORD if unspaced else 1
    letters = max(1, sum(map(len, words)))
    for n, bound in _TOP_RUNS.items():
        # of equally frequent runs the longest counts, so that the order of the text does not matter
        counts = Counter(_runs(words, n * scale))
        count = max(counts.values())
        if count == 1:
            break  # then no longer run is repeated either
        run = max((r for r, c in counts.items() if c == count), key=lambda r: sum(map(len, r)))
        if count * sum(map(len, run)) > bound * letters:
            return "repeated_words", f"a run of {n * scale} words occurs {count} times"
    for n, bound in _REPEATED_RUNS.items():
        # a repeated run of n + 1 words holds repeated runs of n: the share can only fall
        share_of = _repeated_share(words, n * scale) / letters
        if share_of > bound:
            return "repeated_words", f"{share_of:.2f} of the text in repeated runs of {n * scale} words"
        if share_of <= min(_REPEATED_RUNS.values()):
            break
    return None


def _runs(words: list[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*[words[k:] for k in range(n)], strict=False))


def _repeated_share(words: list[str], n: int) -> int:
    """Characters in second and further occurrences of runs of n words, each counted once where they overlap."""
    seen: set[tuple[str, ...]] = set()
    covered = [False] * len(words)
    for at, run in enumerate(_runs(words, n)):
        if run in seen:
            covered[at : at + n] = [True] * n
        seen.add(run)
    return sum(len(w) for w, c in zip(words, covered, strict=True) if c)
