"""Names of people in texts, Chinese and English, by two libraries whose data lie in their packages: nothing is fetched.

Chinese: the words that jieba (MIT, dictionary and hidden Markov model in the package) tags as names of people, if they
begin with a common surname. English: a given name and a family name of the census lists in `names` (MIT, 5,163 and 88,799
of them), or a capitalised word after a title. Measured on the sentences of tests/corpus/curation/sentences.py, half of
them without a name and full of words that could be one (60 a language looked at while the rules were made, 40 written
afterwards):

    Chinese  precision .94, recall .88; on the new ones .72 and .82 (ordinary words that jieba tags as names: 熊猫, 叶子)
    English  precision 1.00, recall .84; on the new ones .84 and .76 (Royal Mail, Faith Hope)

Not found: given names alone, family names that the census lacks, names in other languages. jieba takes a second for some
40,000 characters, and three to start. Also looked at: names-dataset holds 3 GB of memory; spaCy's models are not
published on PyPI (what lies there under their names was uploaded by others); GLiNER, flair, stanza and HanLP fetch their
weights when they run.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from mmlm.errors import ConfigError

Span = tuple[int, int]
PACKAGES = ("jieba", "names")
_SURNAMES = frozenset(
    "王李张刘陈杨黄赵吴周徐孙马朱胡郭何高林罗郑梁谢宋唐许韩冯邓曹彭曾肖萧田董袁潘于蒋蔡余杜叶程苏魏吕丁任沈姚卢姜崔钟谭陆汪"
    "范金石廖贾夏韦付傅方白邹孟熊秦邱江尹薛闫段雷侯龙史陶黎贺顾毛郝龚邵万钱严覃武戴莫孔向汤"
)
_DOUBLE = frozenset(re.findall("..", "欧阳司马诸葛上官司徒东方尉迟夏侯皇甫慕容令狐公孙长孙宇文端木南宫"))
_HAN = re.compile("[\u3400-\u9fff]{2,}")
_WORD = r"(?:(?:O['’]|Ma?c)?[A-Z][a-zà-ÿ]+(?:['’-][A-Z][a-zà-ÿ]+)*(?![A-Za-zà-ÿ]))"
_TITLED = re.compile(rf"\b(?:Mr|Mrs|Ms|Miss|Dr|Prof|Professor|Captain|Rev)\b\.? +({_WORD}(?: +(?:[A-Z]\. +)*{_WORD})?)")
_RUN = re.compile(rf"(?<![\w.]){_WORD}(?: +(?:[A-Z]\.|{_WORD}))+")
_PIECE = re.compile(r"[^ ]+")
_HEADS = frozenset(
    re.findall(
        "[a-z]+",
        "street road avenue lane park lake river beach bay hill hills mountain valley island bridge county "
        "city town act university college school institute church hospital hotel station airport museum bank "
        "company corporation group inc court house hall tower square center centre foundation times post week "
        "day sale award prize bill law clause key value number north south east west high general united "
        "states dakota carolina springs falls creek canyon forest garden gardens club league team press sea "
        "ocean january february march april may june july august september october november december monday "
        "tuesday wednesday thursday friday saturday sunday ",
    )
)
"""Words that are family names in the census too, and after a name make it a place, a house or a date."""


def names_in(text: str) -> Iterator[Span]:
    """Where names of people lie in `text`, in no particular order. Raises ConfigError when a library is missing."""
    yield from _chinese(text)
    yield from _english(text)


def versions() -> dict[str, str]:
    """Of the libraries, which decide what is found."""
    try:
        return {name: importlib.metadata.version(name) for name in PACKAGES}
    except importlib.metadata.PackageNotFoundError as error:
        raise _missing(str(error.name)) from None


def _missing(name: str) -> ConfigError:
    return ConfigError(
        f"scan.curate.pii.kinds: name needs {name}, which is not installed", cure='pip install "mmlm-workflows[names]"'
    )


def _chinese(text: str) -> Iterator[Span]:
    if not _HAN.search(text):
        return
    at = 0
    for pair in _tagger().cut(text):
        word, tag = pair.word, pair.flag
        if tag in ("nr", "nrt", "nrfg") and _is_chinese(word, tag):
            yield at, at + len(word)
        at += len(word)


def _is_chinese(word: str, tag: str) -> bool:
    if word[:2] in _DOUBLE:
        return 2 < len(word) <= 4
    foreign = tag == "nrt" and len(word) > 2
    return _HAN.fullmatch(word) is not None and (foreign or (word[0] in _SURNAMES and len(word) <= 3))


@cache
def _tagger() -> Any:
    """jieba's tagger, with the dictionary read anew: the copy that it would keep in /tmp is one that anybody may write."""
    try:
        import logging

        import jieba
        from jieba import posseg
    except ImportError:
        raise _missing("jieba") from None
    jieba.setLogLevel(logging.CRITICAL)
    words = jieba.Tokenizer()
    words.FREQ, words.total = words.gen_pfdict(words.get_dict_file())
    words.initialized = True
    return posseg.POSTokenizer(words)


def _english(text: str) -> Iterator[Span]:
    taken = []
    for found in _TITLED.finditer(text):
        taken.append(found.span(1))
        yield found.span(1)
    given, family = _lists()
    for run in _RUN.finditer(text):
        words = [(m[0], run.start() + m.start(), run.start() + m.end()) for m in _PIECE.finditer(run[0])]
        at = 0
        while at < len(words):
            end = _ends(words, at, given, family)
            if end is None:
                at += 1
                continue
            span = (words[at][1], words[end][2])
            if not any(a < span[1] and span[0] < b for a, b in taken):
                yield span
            at = end + 1


def _ends(words: list[tuple[str, int, int]], at: int, given: frozenset[str], family: frozenset[str]) -> int | None:
    """Number of the last word of the name that begins with word `at`; None where none does."""
    if words[at][0].lower() not in given:
        return None
    next_word = at + 1
    while next_word < len(words) and words[next_word][0].endswith("."):
        next_word += 1
    end = None
    for k in range(next_word, min(next_word + 2, len(words))):
        if not _is_family(words[k][0].lower(), family):
            break
        end = k
    if end is None:
        return None
    around = {word.lower() for word, _, _ in words[at + 1 : end + 2]}
    return None if around & _HEADS else end


def _is_family(word: str, family: frozenset[str]) -> bool:
    pieces = re.split("['’-]", word)
    return "".join(pieces) in family or all(piece in family for piece in pieces)


@cache
def _lists() -> tuple[frozenset[str], frozenset[str]]:
    """Given and family names, in small letters."""
    try:
        import names
    except ImportError:
        raise _missing("names") from None

    def read(*files: str) -> frozenset[str]:
        lines = [
            line for file in files for line in Path(names.full_path(file)).read_text(encoding="ascii").splitlines()
        ]
        return frozenset(line.split()[0].lower() for line in lines if line.strip())

    return read("dist.female.first", "dist.male.first"), read("dist.all.last")
