"""Settings of `scan`: which corpora there are, how their rows become records, and how they are split."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic

from mmlm.config import Config
from mmlm.corpus.select import check_selector, check_template

Selector = Annotated[str, pydantic.AfterValidator(check_selector)]
"""Where a value lies in a row: `label`, `meta.age`, `audio[0].path`, `audio[lang=fr].path`, `pictures[].file`."""
Template = Annotated[str, pydantic.AfterValidator(check_template)]
"""A selector; or, with braces in it, a text whose `{selector}`s are filled in."""
Text = str | dict[str, str]
"""One wording, or one per language code (`other` stands for the languages that are not listed)."""
Patterns = Annotated[list[str], pydantic.BeforeValidator(lambda v: [v] if isinstance(v, str) else v)]
Selectors = Annotated[list[Template], pydantic.BeforeValidator(lambda v: [v] if isinstance(v, str) else v)]
"""One or several places; the first that holds something counts."""
Split = Literal["", "train", "val", "test"]


class KeypadSource(Config):
    """The built-in corpus: noisy handwritten digits, noisy telephone key tones, questions in English and Chinese."""

    kind: Literal["keypad"]
    renderings: int = pydantic.Field(8, ge=1)
    """Records made of each training digit."""
    renderings_held_out: int = pydantic.Field(4, ge=1)
    """Records made of each validation and test digit."""
    images: int = pydantic.Field(1797, ge=3, le=1797)
    """How many of scikit-learn's 1,797 digits are used, from the first."""
    seed: int = 0
    """Seed of sizes, levels, durations, wordings and noise."""


class ChatSource(Config):
    """JSON lines of chat messages: `{"messages": [...]}` or `{"conversations": [...]}`, with media lists or parts."""

    kind: Literal["chat"]
    files: Patterns
    """Paths below --data; `*` and `**` are understood."""
    root: str = ""
    """Folder below --data that media paths are relative to."""
    task: str = "answer"
    """Task of the records that name none."""
    lang: str = ""
    """Language of the records that name none."""
    license: str = ""
    """Licence of the records that name none."""
    split: Split = ""
    """Split of the records that name none; empty: by hash of the group."""


class TableMap(Config):
    """Which column holds what. Everything may be absent."""

    id: Selector | None = None
    """Absent: the hash of the row."""
    group: Selector | None = None
    """Rows of one group never fall into two splits. Absent: every row is a group of its own."""
    split: Selector | None = None
    lang: Selector | None = None
    license: Selector | None = None
    source: Selector | None = None
    image: Selectors = []
    """Path, data: URI, or bytes of a picture."""
    audio: Selectors = []
    """Path, data: URI, or bytes of a sound."""
    many: Literal["first", "all"] = "first"
    """What to do when a cell holds several pictures or sounds."""
    fields: dict[str, Selector] | Selector = {}
    """name → column of a number or category; or one selector of a mapping, all of whose entries are taken."""
    categories: list[str] = []
    """Names of fields that are categories even where their values look like numbers."""


class Ask(Config):
    """One question asked of every row (or, with `each`, of every entry of a mapping or list in the row)."""

    task: str
    question: Text = ""
    """The wording; `{selector}`s in it are filled in. Several languages without `lang`: they alternate by id."""
    text: Selector | None = None
    """Text of the row that is, or stands before, the question."""
    context: Template | None = None
    """Text beside the question that may be taken away, such as a caption."""
    label: Template | None = None
    labels: Selector | None = None
    number: Selector | None = None
    answer: Template | None = None
    lang: Template | None = None
    """Language of the record; with `each`, usually `{key}`. Absent: the row's, else that of the wording."""
    each: Selector | None = None
    """A mapping or list: one record per entry, with `{key}`, `{value}` and `{name}` at hand in every template."""
    keep: list[str] | None = None
    """Keys of `each` that are asked; the others are left out. Absent: all."""
    names: dict[str, str] = {}
    """key → `{name}`; a key without a name is its own name."""
    image: Selectors | None = None
    """Instead of the map's; an empty list leaves the picture out."""
    audio: Selectors | None = None
    """Instead of the map's; an empty list leaves the sound out."""

    @pydantic.model_validator(mode="after")
    def _has_target(self) -> Ask:
        if not any((self.label, self.labels, self.number, self.answer)):
            raise ValueError("one of label, labels, number, answer must say where the target lies")
        if self.each is None and (self.keep is not None or self.names):
            raise ValueError("keep and names need `each`")
        return self


class TableSource(Config):
    """A flat or nested table: JSON lines, a JSON list, CSV, TSV or Parquet, told apart by the file's ending."""

    kind: Literal["table"]
    files: Patterns
    """Paths below --data; `*` and `**` are understood."""
    root: str = ""
    """Folder below --data that media paths are relative to."""
    map: TableMap = TableMap()
    ask: list[Ask] = pydantic.Field(min_length=1)
    lang: str = ""
    """Language of the rows that name none."""
    license: str = ""
    """Licence of the rows that name none."""
    split: Split = ""
    """Split of the rows that name none; empty: by hash of the group."""


class FolderSource(Config):
    """A folder per class with pictures, sounds or texts in it; also below folders called train, val and test."""

    kind: Literal["folders"]
    path: str = "."
    """Folder below --data that holds the class folders."""
    task: str = "category"
    question: Text = {"en": "Which class is this?", "zh": "这是哪一类？"}
    """Asked of pictures and sounds; a text is its own question."""
    nested: bool = False
    """false: what lies deeper belongs to the class folder above; true: the whole path is the class (`birds/owl`)."""
    license: str = ""
    split: Split = ""
    """Split of all files; empty: from train|val|test folders where there are such, else by hash of the content."""


Source = Annotated[KeypadSource | ChatSource | TableSource | FolderSource, pydantic.Field(discriminator="kind")]


class SplitConfig(Config):
    """How groups are split where the data do not say. A split that the data give wins."""

    val: float = pydantic.Field(0.1, ge=0, lt=1)
    """Share of the groups."""
    test: float = pydantic.Field(0.1, ge=0, lt=1)
    """Share of the groups."""
    salt: str = ""
    """Another salt is another split."""
    fill: bool = True
    """When the data give a training split but no val or no test at all, take that share from the training groups."""

    @pydantic.model_validator(mode="after")
    def _leaves_train(self) -> SplitConfig:
        if self.val + self.test >= 1:
            raise ValueError("val + test must leave something to train on")
        return self


class ScanConfig(Config):
    """Raw corpora → Manifest."""

    sources: list[Source] = pydantic.Field(min_length=1)
    """Paths in them are relative to --data, which is never part of the identity."""
    split: SplitConfig = SplitConfig()
    on_bad_part: Literal["refuse", "drop_part"] = "refuse"
    """A record with one broken picture or sound among several parts: refused, or kept without it (counted)."""
    error_budget: float = pydantic.Field(0.1, ge=0, le=1)
    """Share of what was found that may be refused; more stops the run."""
    allow_remote: bool = False
    """Whether http://, s3:// and the like in the data are fetched; otherwise such records are refused."""
