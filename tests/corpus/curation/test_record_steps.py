"""Language, quality and personal data of one record at a time."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from typing import Any

import pytest

from mmlm.config import parse, resolved
from mmlm.corpus.curation.config import CurateConfig, QualityConfig
from mmlm.corpus.curation.events import Figures
from mmlm.corpus.curation.language import identify
from mmlm.corpus.curation.quality import fault
from mmlm.corpus.curation.record_steps import RecordSteps
from mmlm.corpus.records import Part, Record, Target
from mmlm.errors import ConfigError

SAMPLES = {
    "en": ["Hello, how are you?", "What is shown in this picture?", "The cat sat on the mat."],
    "zh": ["你好", "这是什么？", "今天天气很好，我们去公园吧。", "請問這是什麼？", "我用 Python 写了一个程序"],
    "es": ["¿Dónde está la biblioteca?", "Me gusta mucho esta película."],
    "fr": ["Où est la bibliothèque ?", "J'aime beaucoup ce film."],
    "de": ["Wo ist die Bibliothek?", "Das ist ein sehr guter Film."],
    "it": ["Mi piace molto questo film, è davvero bello."], "pt": ["Onde fica a biblioteca? Não sei."],
    "nl": ["Waar is de bibliotheek?"], "sv": ["Var ligger biblioteket? Jag vet inte."], "pl": ["Gdzie jest biblioteka?"],
    "ru": ["Где находится библиотека?"], "uk": ["Де знаходиться бібліотека?"],
    "ja": ["図書館はどこですか？", "これは何ですか"], "ko": ["도서관은 어디에 있습니까?"],
    "ar": ["أين تقع المكتبة؟"], "fa": ["کتابخانه کجاست؟ نمی‌دانم"], "he": ["איפה הספרייה?"],
    "hi": ["पुस्तकालय कहाँ है?"], "th": ["ห้องสมุดอยู่ที่ไหน"], "vi": ["Thư viện ở đâu?"], "tr": ["Kütüphane nerede?"],
    "id": ["Saya tidak tahu di mana perpustakaan itu."], "el": ["Πού είναι η βιβλιοθήκη;"], "fi": ["Missä kirjasto on?"],
    "hu": ["Hol van a könyvtár?"], "ro": ["Unde este biblioteca? Nu știu."], "ta": ["நூலகம் எங்கே உள்ளது?"],
}  # fmt: skip


def record(*texts: str, answer: str | None = None, **more: str) -> Record:
    return Record("r1", tuple(Part("text", text=t) for t in texts), target=Target(text=answer), **more)


def steps(**config: object) -> RecordSteps:
    return RecordSteps(CurateConfig.model_validate(config))


def test_all_is_off_by_default() -> None:
    assert set(resolved(CurateConfig()).values()) == {None}
    one = record("13812345678 ok")
    assert steps().apply(one).record is one
    assert CurateConfig().set_steps == CurateConfig().record_steps == ()
    with pytest.raises(ConfigError, match="did you mean `near_text`"):
        parse(CurateConfig, {"near_txt": {}}, "test")


# --- language


@pytest.mark.parametrize(("lang", "text"), [(lang, t) for lang, texts in SAMPLES.items() for t in texts])
def test_the_language_of_short_texts(lang: str, text: str) -> None:
    found, confidence = identify(text)
    assert found == lang and confidence > 0.4


def test_what_is_no_language_has_none() -> None:
    for text in ("", "12345", "!!! …", "🙂🙂"):
        assert identify(text) == ("", 0.0)


def test_an_empty_language_is_filled_and_others_are_dropped() -> None:
    config = {"language": {"keep": ["zh", "en"]}}
    found = steps(**config).apply(record("这是什么？"))
    assert found.record and found.record.lang == "zh"
    assert [(e.action, e.reason, e.detail) for e in found.events] == [("changed", "detected", "zh")]
    gone = steps(**config).apply(record("Где находится библиотека?"))
    assert gone.record is None
    assert [(e.action, e.reason) for e in gone.events] == [("changed", "detected"), ("dropped", "other_language")]
    assert steps(**config).apply(record("Hello there, how are you", lang="zh-Hans")).events == ()
    told = steps(language={"trust": False}).apply(record("Hello there, how are you", lang="zh"))
    assert told.record and told.record.lang == "en" and told.events[0].reason == "corrected"


def test_an_unknown_language_stays_or_goes() -> None:
    assert steps(language={"keep": ["en"]}).apply(record("ok")).record is not None
    gone = steps(language={"keep": ["en"], "unknown": "drop"}).apply(record("42"))
    assert gone.record is None and gone.events[0].reason == "unknown_language"


def test_the_choice_of_languages() -> None:
    assert identify("Kde je knihovna?", ("cs", "en"))[0] == "cs"
    assert identify("这是什么？", ("cs", "en")) == ("", 0.0)
    assert identify("Hello there", ("zh",)) == ("", 0.0)
    with pytest.raises(ConfigError, match="klingon"):
        identify("Hello there", ("klingon",))


# --- quality

PROSE = (
    "The library stands at the eastern end of the old town, and it opens at eight in the morning. People from all over "
    "the county come to read there, to borrow films, or simply to sit by the tall windows that look over the river. "
    "Twice a week a group of volunteers helps children with their homework; on Fridays they play chess instead. "
    "It has survived two floods and a fire, and its oldest book is older than the building."
)
HAN = (
    "图书馆位于老城区的东边，每天早上八点开门。来自全县各地的人们到这里读书、借电影，或者只是坐在高大的窗户旁边看河上的风景。"
    "每周有两次，一群志愿者帮助孩子们做作业；到了星期五，大家就一起下棋。这座建筑经历过两次洪水和一场大火，而馆内最古老的一本书比楼本身还要老。"
)


def reason(text: str, lang: str = "", **bounds: object) -> str | None:
    found = fault(text, lang, QualityConfig.model_validate(bounds))
    return found[0] if found else None


def test_good_prose_passes_the_defaults_in_english_and_chinese() -> None:
    assert reason(PROSE, "en") is None
    assert reason(HAN, "zh") is None
    assert reason(HAN + PROSE, "zh") is None


@pytest.mark.parametrize(
    ("expected", "text", "lang"),
    [
        ("too_few_words", "Just a few words.", "en"),
        ("too_few_words", HAN[:40], "zh"),
        ("short_words", "a b c d " * 20, "en"),
        ("long_words", "incomprehensibilities counterrevolutionary " * 30, "en"),
        ("symbols", PROSE + " #" * 20, "en"),
        ("symbols", HAN + "…#" * 20, "zh"),
        ("not_alphabetic", PROSE + " 100 200 300" * 10, "en"),
        ("not_alphabetic", HAN + "　12　34　56" * 20, "zh"),
        ("few_stop_words", " ".join(w for w in PROSE.replace(";", "").split() if len(w) > 4) * 2, "en"),
        ("bullets", "\n".join("- " + s for s in re.split("[.,;]", PROSE[:-1])), "en"),
        ("ellipses", PROSE.replace(". ", "...\n").replace("; ", "...\n") + "...", "en"),
        ("repeated_lines", (PROSE[:90] + "\n") * 5 + PROSE, "en"),
        ("repeated_lines", (HAN[:30] + "\n") * 5 + HAN, "zh"),
        ("repeated_paragraphs", PROSE.replace(" the ", " the\n") + "\n\nThanks." * 3, "en"),
        ("repeated_words", PROSE + " buy cheap watches online now" * 12, "en"),
        ("repeated_words", HAN + "点击这里购买便宜手表" * 12, "zh"),
        ("repeated_words", PROSE + " " + PROSE, "en"),
    ],
)  # fmt: skip
def test_each_rule_has_a_text_that_breaks_it(expected: str, text: str, lang: str) -> None:
    found = reason(text, lang)
    assert found == expected


def test_bounds_on_characters_and_banned_words() -> None:
    short: dict[str, Any] = {"min_words": None, "min_stop_words": None, "min_word_length": None}
    assert reason("hi", min_chars=3, **short) == "too_few_chars"
    assert reason("hi there", max_chars=3, **short) == "too_many_chars"
    assert reason("你好吗朋友", max_words=4, **short) == "too_many_words"
    assert reason(PROSE + " Lorem Ipsum dolor.", "en", banned=["lorem ipsum"]) == "banned"
    assert reason("What is this?", "en", **short) is None


def test_the_stop_words_of_an_unknown_language_are_not_looked_for() -> None:
    text = " ".join(w for w in PROSE.replace(";", "").split() if len(w) > 4) * 2
    assert reason(text, "en") == "few_stop_words"
    assert reason(text, "", repeats=False) is None and reason(text, "xx", repeats=False) is None


def test_a_record_without_text_is_out_of_reach_unless_said_otherwise() -> None:
    picture = Record("p", (Part("image", uri="a.png"),), target=Target(label="cat"))
    assert steps(quality={}).apply(picture).record is picture
    assert steps(quality={"without_text": "drop"}).apply(picture).events[0].reason == "no_text"


# --- personal data in records


def test_texts_and_answers_are_scrubbed_and_labels_never() -> None:
    one = Record(
        "a@b.com", (Part("text", text="call 13812345678"), Part("image", uri="x@y.com.png"), Part("text", "system", "a@b.com"),
                    Part("fields", fields={"mail": "a@b.com"})),
        target=Target(label="a@b.com", text="write to c@d.org"), group="a@b.com",
    )  # fmt: skip
    found = steps(pii={}).apply(one)
    assert found.record == replace(
        one, parts=(Part("text", text="call <phone>"), one.parts[1], Part("text", "system", "<email>"), one.parts[3]),
        target=Target(label="a@b.com", text="write to <email>"),
    )  # fmt: skip
    assert [(e.action, e.reason, e.detail) for e in found.events] == [
        ("changed", "email", "2 found"), ("changed", "phone", "1 found"),
    ]  # fmt: skip
    assert steps(pii={"action": "drop"}).apply(one).record is None
    assert "138" not in repr(found.events)


def test_a_record_comes_out_the_same_at_any_time_and_twice() -> None:
    made = steps(language={"keep": ["en", "zh"]}, quality={"min_words": 3, "repeats": False}, pii={"action": "hash"})
    records = [
        record(t, answer=a, lang=lang)
        for t in [PROSE, HAN, "call 13812345678 or +44 20 7946 0958 and the rest", "Где находится библиотека?", "ok"]
        for a in (None, "write to a@b.com")
        for lang in ("", "en")
    ]
    first = [made.apply(r) for r in records]
    random.Random(0).shuffle(records)
    again = {r: made.apply(r) for r in records}
    for one, found in zip([c.record for c in first], first, strict=True):
        if one is not None:
            assert made.apply(one).record == one
        assert found in again.values()


def test_figures_count_what_each_step_saw() -> None:
    made = steps(language={"keep": ["zh"]}, pii={})
    figures = Figures(made.steps)
    for r in [record("这是什么？13812345678"), record("这是什么？", lang="zh"), record("Hello there, how are you?")]:
        figures.note("a.csv", made.apply(r).events, made.steps)
    assert figures.counts() == {
        "language": {"a.csv": {"kept": 2, "dropped": 1, "changed": 1}},
        "pii": {"a.csv": {"kept": 2, "dropped": 0, "changed": 1}},
    }
    assert figures.reasons()["language"]["a.csv"] == {"detected": 2, "other_language": 1}
