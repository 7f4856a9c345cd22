"""Settings of curation. Every step is off until its section is written; `{}` turns it on with what stands here."""

from __future__ import annotations

from typing import Literal

import pydantic

from mmlm.config import Config


class QualityConfig(Config):
    """Rules for the text of a record (parts of role user and context, and the answer). A bound of null is no rule.

    Bounds marked G are those of Gopher (Rae et al. 2021, arXiv:2112.11446, table A1), bounds marked C4 those of
    Raffel et al. 2020 (arXiv:1910.10683, section 2.2). They are meant for web documents; `repeats: false` and a small
    `min_words` suit questions and reviews. In scripts without spaces (Chinese, Japanese, Thai …) every character
    counts as a word, and the rules on the length of words and on stop words do not apply.
    """

    min_chars: int | None = pydantic.Field(None, ge=0)
    max_chars: int | None = pydantic.Field(None, ge=1)
    min_words: int | None = pydantic.Field(50, ge=0)
    """G."""
    max_words: int | None = pydantic.Field(100_000, ge=1)
    """G."""
    min_word_length: float | None = 3.0
    """G. Mean number of characters of a word."""
    max_word_length: float | None = 10.0
    """G. Mean number of characters of a word."""
    max_symbol_ratio: float | None = 0.1
    """G. Number signs and ellipses, per word."""
    min_alphabetic: float | None = 0.8
    """G. Share of the words with at least one letter."""
    min_stop_words: int | None = 2
    """G. Common words of the language that must appear; only for languages whose list is known."""
    max_bullet_lines: float | None = 0.9
    """G. Share of the lines that begin with a bullet."""
    max_ellipsis_lines: float | None = 0.3
    """G. Share of the lines that end in an ellipsis."""
    banned: tuple[str, ...] = ()
    """C4 drops pages with `lorem ipsum` or `{`: parts of a text, whatever their case, that drop the record."""
    repeats: bool = True
    """G. Repeated lines, paragraphs and runs of words, by the bounds of table A1."""
    without_text: Literal["keep", "drop"] = "keep"
    """A record without any text: out of reach of these rules, or dropped."""


class LanguageConfig(Config):
    """The language of the text, by its script where one language owns the script, else by py3langid."""

    keep: tuple[str, ...] | None = None
    """Codes of ISO 639-1 that are kept (`zh` covers `zh-Hans`). Absent: every language."""
    languages: tuple[str, ...] | None = None
    """Languages to choose from. Absent: 54 common ones."""
    min_confidence: float = pydantic.Field(0.5, ge=0, le=1)
    """Below it the language stays unknown."""
    unknown: Literal["keep", "drop"] = "keep"
    """What happens, with `keep` given, to a record whose language is unknown."""
    trust: bool = True
    """Whether a language that the data give is believed; otherwise the text decides where it can."""


PiiKind = Literal["email", "phone", "national_id", "card", "iban", "ip", "name"]


class PiiConfig(Config):
    """Personal data in text parts and text answers. Labels, ids, groups and fields stay as they are.

    `name` is names of people, Chinese and English (the extra `names`: jieba and names). It is no check as the others are:
    some ordinary words are taken for names and some names are missed, see mmlm/corpus/curation/names.py for how many.
    """

    action: Literal["redact", "hash", "drop"] = "redact"
    """redact: `tag` stands instead; hash: `tag` with a keyed hash in it, so that equal values stay equal; drop: the
    record is left out."""
    kinds: tuple[PiiKind, ...] = ("email", "phone", "national_id", "card", "iban")
    tag: str = "<{kind}>"
    """What stands instead; `{kind}` is filled in."""
    salt: str = ""
    """Key of the hash. It is stored with the config, as everything that changes a manifest: whoever sees it can test
    guesses of short numbers. Redact where that matters."""

    @pydantic.field_validator("tag")
    @classmethod
    def _fills(cls, tag: str) -> str:
        try:
            tag.format(kind="email")
        except (KeyError, IndexError, ValueError):
            raise ValueError("only {kind} can be filled in") from None
        return tag

    @pydantic.model_validator(mode="after")
    def _shows_hash(self) -> PiiConfig:
        if self.action == "hash" and "{kind}" not in self.tag:
            raise ValueError("action `hash` needs a tag with {kind} in it, which is where the hash goes")
        return self


class ExactConfig(Config):
    """Records of one task with the same parts (the bytes of the media included) and the same target: one is kept."""


class NearTextConfig(Config):
    """Near-duplicate texts of one task with the same media: MinHash (Broder 1997), then the exact Jaccard."""

    ngram: int = pydantic.Field(5, ge=1, le=32)
    """Words (characters, in scripts without spaces) of a shingle."""
    buckets: int = pydantic.Field(28, ge=1, le=256)
    """Bands of the signature; records that agree in one band are compared."""
    rows: int = pydantic.Field(4, ge=1, le=32)
    """Hashes in a band. Two texts of similarity s are compared with probability 1-(1-s^rows)^buckets."""
    threshold: float = pydantic.Field(0.8, gt=0, le=1)
    """Jaccard similarity of the shingle sets from which on two texts are near-duplicates."""


class NearImagesConfig(Config):
    """Near-duplicate pictures of one task: a 64-bit perceptual hash (Zauner 2010) and the mean colour of 8 × 8 cells."""

    distance: int = pydantic.Field(4, ge=0, le=15)
    """Bits in which two hashes may differ."""
    tolerance: float = pydantic.Field(5.0, ge=0, le=255)
    """Mean difference of the cells (0 to 255) up to which they are alike: the hash knows no colour, this does."""


class ContaminationConfig(Config):
    """Training records of which a val or test record knows something are dropped from train."""

    groups: bool = True
    """Training records whose group is also in val or test (only data that tear a group apart have them)."""
    ngram: int | None = pydantic.Field(13, ge=2, le=64)
    """Words (characters, in scripts without spaces) of a run that counts as shared; 13 as Brown et al. 2020
    (arXiv:2005.14165, appendix C). null: shared runs are not looked at."""
    share: float = pydantic.Field(0.5, gt=0, le=1)
    """Shared runs, as a share of the runs of the shorter one of the two records, that drop the training record."""
    common: int = pydantic.Field(10, ge=1)
    """Runs in more records than this on both sides together are wording (a prompt, a licence), not content."""
    near_text: NearTextConfig | None = NearTextConfig()
    """Near-duplicate texts, whatever task and media. null: not looked at."""
    near_images: NearImagesConfig | None = NearImagesConfig()
    """Near-duplicate pictures, whatever task. null: not looked at."""


class BalanceConfig(Config):
    """No source may have too much of the training records. Which ones stay is decided by a hash of their ids."""

    records: int | None = pydantic.Field(None, ge=1)
    """At most so many training records of a source."""
    share: float | None = pydantic.Field(None, gt=0, le=1)
    """At most this share of the training records that are left in the end."""
    sources: dict[str, int] = {}
    """source → at most so many of its training records, instead of `records`."""
    salt: str = ""
    """Another salt is another choice."""


class CurateConfig(Config):
    """What happens to records between the raw corpus and the manifest. Nothing, unless a step is named.

    The steps run in the order of these fields. Language, quality and PII look at one record at a time; the others at
    all of them. Of duplicates one is kept: a test record before a val record before a train record, then the one with
    the smallest id.
    """

    language: LanguageConfig | None = None
    quality: QualityConfig | None = None
    pii: PiiConfig | None = None
    exact: ExactConfig | None = None
    near_text: NearTextConfig | None = None
    near_images: NearImagesConfig | None = None
    contamination: ContaminationConfig | None = None
    balance: BalanceConfig | None = None

    @property
    def record_steps(self) -> tuple[str, ...]:
        """Names of the steps that look at one record, in order."""
        return tuple(s for s in ("language", "quality", "pii") if getattr(self, s) is not None)

    @property
    def set_steps(self) -> tuple[str, ...]:
        """Names of the steps that look at all records, in order."""
        names = ("exact", "near_text", "near_images", "contamination", "balance")
        return tuple(s for s in names if getattr(self, s) is not None)
