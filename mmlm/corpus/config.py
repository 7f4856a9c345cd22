"""Settings of `scan`: which corpora there are, how their rows become records, and how they are split."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic

from mmlm.config import Config
from mmlm.corpus.curation.config import CurateConfig
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
CAPTION: dict[str, str] = {"en": "Describe what is given.", "zh": "请描述给出的内容。"}
"""What is asked where the answer is a caption and the source says no wording."""


class PiecesConfig(Config):
    """A long sound becomes overlapping pieces, each a record of its own with the same target and group."""

    seconds: float = pydantic.Field(30.0, gt=0)
    """Length of a piece; a sound that is not longer stays whole."""
    overlap: float = pydantic.Field(0.0, ge=0)
    """Seconds that a piece shares with the one before it."""
    min_seconds: float = pydantic.Field(1.0, ge=0)
    """A last piece shorter than this is left out."""

    @pydantic.model_validator(mode="after")
    def _moves_on(self) -> PiecesConfig:
        if self.overlap >= self.seconds:
            raise ValueError("overlap must be smaller than seconds, or the pieces would never end")
        return self


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
    id: Literal["given", "hash"] = "given"
    """given: the line's `id`, or its hash where it has none. hash: always its hash, for lines that repeat an `id`, which is
    then the group of those that name none."""
    task: str = "answer"
    """Task of the records that name none."""
    lang: str = ""
    """Language of the records that name none."""
    license: str = ""
    """Licence of the records that name none."""
    split: Split = ""
    """Split of the records that name none; empty: by hash of the group."""
    pieces: PiecesConfig | None = None
    """How long sounds are cut; absent: they stay whole."""


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
    video: Selectors = []
    """Path, data: URI, or bytes of a video."""
    many: Literal["first", "all"] = "first"
    """What to do when a cell holds several pictures, sounds or videos."""
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
    video: Selectors | None = None
    """Instead of the map's; an empty list leaves the video out."""

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
    """Paths below --data; `*`, `**` and `{000..012}` are understood. A folder stands for the Parquet files in it; what
    their folders are called (`lang=en/part-0.parquet`) are columns too."""
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
    pieces: PiecesConfig | None = None
    """How long sounds are cut; absent: they stay whole."""


class FolderSource(Config):
    """A folder per class with pictures, sounds, videos or texts in it; also below folders called train, val and test."""

    kind: Literal["folders"]
    path: str = "."
    """Folder below --data that holds the class folders."""
    task: str = "category"
    question: Text = {"en": "Which class is this?", "zh": "这是哪一类？"}
    """Asked of pictures, sounds and videos; a text is its own question."""
    nested: bool = False
    """false: what lies deeper belongs to the class folder above; true: the whole path is the class (`birds/owl`)."""
    license: str = ""
    split: Split = ""
    """Split of all files; empty: from train|val|test folders where there are such, else by hash of the content."""
    pieces: PiecesConfig | None = None
    """How long sounds are cut; absent: they stay whole."""


class SidecarSource(Config):
    """Files of one name side by side make one record: `x.png` + `x.txt` (+ `x.ogg`) (+ `x.json`).

    `x.json` may hold `answer`, `label`, `labels`, `number`, `question`, `context`, `fields`, `task`, `lang`, `group`,
    `split` and `license`.
    """

    kind: Literal["sidecar"]
    path: str = "."
    """Folder below --data, looked through to its depth; also below folders called train, val and test."""
    text: Literal["answer", "context", "question"] = "answer"
    """What the text file is: the caption to be answered, text beside the question, or the question itself."""
    task: str = "caption"
    question: Text = CAPTION
    """Asked of every record that brings no question of its own."""
    alone: bool = False
    """Whether a picture or sound without a text or JSON file beside it (or a text without one) is taken where it has a
    target; false: refused as `no_partner`."""
    ignore: list[str] = []
    """Endings of files to pass over."""
    lang: str = ""
    license: str = ""
    split: Split = ""
    """Split of all files; empty: from train|val|test folders where there are such, else by hash of the content."""
    pieces: PiecesConfig | None = None
    """How long sounds are cut; absent: they stay whole."""


class WebDatasetSource(Config):
    """Existing WebDataset tars. Pictures, sounds and videos stay where they are and are read in place; texts and JSON
    are read. A row's columns are the endings of its members (`jpg`, `txt`, `json.caption`) and `__key__`."""

    kind: Literal["webdataset"]
    files: Patterns
    """Paths of `.tar` files below --data; `*`, `**` and `{000..012}` are understood."""
    map: TableMap = TableMap()
    """Which member holds what; `image`, `audio` and `video` that are absent are known by their endings."""
    ask: list[Ask] = []
    """Absent: `txt` or `caption` is the answer, `cls` (or `json.label`) the label."""
    ignore: list[str] = []
    """Endings of members to pass over. Pickles (`pyd`, `pkl`, `pth`, ...) are never read: a sample with one is refused
    unless its ending stands here."""
    lang: str = ""
    license: str = ""
    split: Split = ""
    """Split of all samples; empty: from the tar's name (`train-000.tar`) where it says so, else by hash."""
    pieces: PiecesConfig | None = None
    """How long sounds are cut; absent: they stay whole."""


class HfSource(Config):
    """A Hugging Face data set on disk: a folder made by `save_to_disk`, or a repository of Parquet files."""

    kind: Literal["hf"]
    path: str = "."
    """Folder below --data that holds `dataset_info.json`, `dataset_dict.json`, or Parquet files."""
    config: str = ""
    """Which configuration of a repository that names several in its README.md."""
    map: TableMap = TableMap()
    """Absent entries are read off the features: Image, Audio and Video columns."""
    ask: list[Ask] = []
    """Absent: read off the features: a ClassLabel is a label; else a column called answer, caption and the like."""
    lang: str = ""
    license: str = ""
    split: Split = ""
    """Split of all rows; empty: from the folder's or file's name, else by hash."""
    pieces: PiecesConfig | None = None
    """How long sounds are cut; absent: they stay whole."""


class DocumentsSource(Config):
    """Plain text, Markdown, HTML, WARC and PDF, cut into pieces at paragraphs and sentences, for learning to continue.

    The first sentence of a piece is what is given, the rest is the answer. All pieces of a document are one group.
    """

    kind: Literal["documents"]
    files: Patterns = ["."]
    """Paths below --data; `*` and `**` are understood. A folder stands for all .txt .md .html .warc .pdf files in it."""
    task: str = "text"
    question: Text = ""
    """A wording put before the first sentence, such as "Continue the text."; empty: none."""
    title: bool = True
    """Whether the document's title, or the heading that a piece stands under, is given as context."""
    max_chars: int = pydantic.Field(2000, ge=40)
    """Characters of the longest piece."""
    min_chars: int = pydantic.Field(20, ge=2)
    """A document shorter than this is refused; a rest shorter than this is joined to the piece before it."""
    overlap: int = pydantic.Field(0, ge=0)
    """Characters of whole sentences at the end of a piece that the next one begins with, at most."""
    max_bytes: int = pydantic.Field(64 << 20, ge=1)
    """Bytes of the largest document that is read."""
    max_pages: int = pydantic.Field(2000, ge=1)
    """Pages of the longest PDF that is read."""
    max_seconds: float = pydantic.Field(60.0, gt=0)
    """Seconds that reading one PDF may take."""
    lang: str = ""
    license: str = ""
    split: Split = ""
    """Split of all documents; empty: from train|val|test folders where there are such, else by hash of the content."""

    @pydantic.model_validator(mode="after")
    def _moves_on(self) -> DocumentsSource:
        if self.overlap > self.max_chars // 2:
            raise ValueError("overlap may be at most half of max_chars")
        if self.min_chars > self.max_chars // 2:
            raise ValueError("min_chars may be at most half of max_chars")
        return self


Source = Annotated[
    KeypadSource
    | ChatSource
    | TableSource
    | FolderSource
    | SidecarSource
    | WebDatasetSource
    | HfSource
    | DocumentsSource,
    pydantic.Field(discriminator="kind"),
]


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
    shared_media: int | None = pydantic.Field(100, ge=2)
    """Groups that have a picture, sound or video in common share a split, unless more groups than this have it (a logo, a
    placeholder). null: groups alone decide."""

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
    curate: CurateConfig = CurateConfig()
    """Filters, duplicates, personal data, contamination, balance: every step is off unless it is named."""
    on_bad_part: Literal["refuse", "drop_part"] = "refuse"
    """A record with one broken picture or sound among several parts: refused, or kept without it (counted)."""
    error_budget: float = pydantic.Field(0.1, ge=0, le=1)
    """Share of what was found that may be refused; more stops the run."""
    allow_remote: bool = False
    """Whether http://, s3:// and the like in the data are fetched; otherwise such records are refused."""
    allow_video: bool = True
    """Whether videos are taken; false: a record with one is refused as `unsupported_kind`."""
