"""FeatureSpec: what a ShardSet holds, in numbers. The model is built from ModelConfig + this, nothing is said twice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from mmlm.config import Config, parse
from mmlm.errors import ArtifactError
from mmlm.storage import sha256_json, write_json

FILE = "feature_spec.json"

PAD, BOS, EOS, ANSWER, IMAGE, AUDIO, FIELDS, CONTEXT, UNKNOWN_TASK = range(9)
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<answer>", "<image>", "<audio>", "<fields>", "<context>", "<task>")
"""Ids 0-8 of every tokenizer that mmlm trains; IMAGE, AUDIO and FIELDS are the media slots."""


class ImageSpec(Config):
    added: ClassVar[tuple[str, ...]] = ("scale",)
    size: int = Field(ge=1, le=4096)
    """Side of the square picture, pixels."""
    patch: int = Field(ge=1)
    """Side of a square patch, pixels; divides `size`."""
    channels: Literal[1, 3]
    resize: Literal["pad", "crop", "stretch"] = "pad"
    padding: Literal["keep", "drop"] = "keep"
    """`drop`: patches at two opposite edges that have but the colour of the corner, as what `pad` fills up with, become no
    tokens: a wide picture is then as long as its shape."""
    scale: Literal["relative", "fixed"] = "relative"
    """`relative`: a picture's own mean becomes 0 and its standard deviation 1, so that light and exposure say nothing. `fixed`:
    black is -2 and white 2 in all of them, so that how bright a picture is, and of which colour, tells something, too."""

    @model_validator(mode="after")
    def _whole_patches(self) -> Self:
        if self.size % self.patch:
            raise ValueError(f"size {self.size} must be a multiple of patch {self.patch}")
        return self

    @property
    def tokens(self) -> int:
        """Of one picture, at most."""
        return (self.size // self.patch) ** 2

    @property
    def patch_dim(self) -> int:
        return self.patch * self.patch * self.channels


class AudioSpec(Config):
    sample_rate: int = Field(16000, ge=1000, le=384_000)
    """Hz, after resampling."""
    n_fft: int = Field(400, ge=2, le=65_536)
    """Window, samples."""
    hop: int = Field(160, ge=1)
    """Step between frames, samples."""
    n_mels: int = Field(80, ge=1, le=1024)
    max_seconds: float = Field(8.0, gt=0)
    """Longer sounds are cut here, and counted, unless `on_long` says otherwise."""
    frames_per_token: int = Field(8, ge=1)
    """Mel frames stacked into one audio token."""
    floor: float = Field(-6.0, lt=0)
    """log10 mel is taken relative to the maximum of the sound and floored here; of the scale `relative` only."""
    scale: Literal["relative", "whisper"] = "relative"
    """`relative` does not depend on the level; `whisper` is what Whisper's encoders read, about -1.5 to 1.5."""
    dtype: Literal["float16", "float32"] | None = None
    """How log-mels are stored. Absent: float16 for `relative`, which it rounds by up to 0.002, and float32 for `whisper`,
    which float16 would round by up to 0.0005."""
    trim_db: float | None = Field(default=None, gt=0)
    """Take away the beginning and end that are this many decibels weaker than the loudest 10 ms; 30 to 60 is usual."""
    on_long: Literal["cut", "refuse"] = "cut"
    """Sounds longer than `max_seconds`: cut them, or send them to quarantine as `too_long`."""

    @model_validator(mode="after")
    def _some_frame(self) -> Self:
        if not self.max_frames:
            raise ValueError(
                f"max_seconds {self.max_seconds:g} is no whole hop, which is {self.hop / self.sample_rate:g} s"
            )
        return self

    @property
    def stored(self) -> str:
        """The type in which log-mels are stored."""
        return self.dtype or ("float32" if self.scale == "whisper" else "float16")

    @property
    def token_dim(self) -> int:
        return self.frames_per_token * self.n_mels

    @property
    def silence(self) -> float:
        """The value of no sound at all: what shorter sounds are filled up with."""
        return self.floor if self.scale == "relative" else -1.5

    @property
    def to_unit(self) -> tuple[float, float]:
        """(factor, offset) that bring stored values to about [-1, 1]: value × factor + offset."""
        return (-2 / self.floor, 1.0) if self.scale == "relative" else (1.0, 0.0)

    @property
    def max_frames(self) -> int:
        return int(self.max_seconds * self.sample_rate) // self.hop


class VideoSpec(Config):
    """A video becomes pictures, as ImageSpec says, and one sound, as AudioSpec says; what has no spec is left out."""

    fps: float = Field(default=1.0, gt=0, le=60)
    """Pictures taken from each second; the first at its beginning."""
    max_frames: int = Field(default=8, ge=1, le=1024)
    """Pictures taken from one video at most."""
    spread: bool = True
    """Whether the pictures of a longer video lie evenly over all of it; otherwise its beginning is taken."""
    sound: bool = True
    """Whether the sound track is used."""


class EncoderSpec(Config):
    """What a pretrained encoder gives for one picture or sound: (tokens, dim) float16."""

    digest: str
    """sha256 over the names and bytes of the checkpoint's files."""
    dim: int
    """Values of a token."""
    tokens: int
    """At most: a sound has as many as it lasts."""
    read: bool = False
    """Whether models read them in place of the patches or mel frames."""


class FieldsSpec(Config):
    """Named numbers (standardised with the training split's mean and standard deviation) and named categories."""

    numbers: dict[str, tuple[float, float]] = {}
    """name → (mean, standard deviation) over the training split."""
    categories: dict[str, list[str]] = {}
    """name → its values, sorted; an unseen value counts as missing."""

    @property
    def names(self) -> list[str]:
        return [*sorted(self.numbers), *sorted(self.categories)]


class TaskSpec(Config):
    """One task of the corpus: tasks with classes or a number are answered by a head, `text` tasks by generation."""

    name: str
    labels: list[str] = []
    """Sorted classes of the training split; empty for a task without classes."""
    multiple: bool = False
    """Any number of the classes may hold at once, none included: each has a probability of its own."""
    number: tuple[float, float] | None = None
    """(mean, standard deviation) over the training split of the number to be answered; None where it is no number."""
    has_text: bool = False
    """Whether records carry an answer text of their own; otherwise the label is the text."""
    langs: list[str] = []
    questions: list[str] = []
    """The distinct questions of the training split, most frequent first (at most 200): routes a question to a task."""


class FeatureSpec(Config):
    """Everything about the features that a model must agree with."""

    vocab_size: int
    tokenizer_digest: str
    max_len: int
    """Longest sequence, tokens and media slots together."""
    image: ImageSpec | None = None
    audio: AudioSpec | None = None
    video: VideoSpec | None = None
    fields: FieldsSpec | None = None
    encoders: dict[str, EncoderSpec] = {}
    """`image`, `audio`: whose features are stored beside the pictures and sounds."""
    chat_template: str = "plain"
    """How the turns of a prompt are laid out: `plain`, `chatml`, or the source of a Jinja template."""
    tasks: list[TaskSpec]

    @property
    def modalities(self) -> tuple[str, ...]:
        """The non-text modalities that this spec has room for."""
        return tuple(m for m in ("audio", "fields", "image") if getattr(self, m) is not None)

    @property
    def digest(self) -> str:
        # without encoders, several classes at once, numbers, padding left out and a fixed scale it is what it was before them
        data = self.model_dump(mode="json", exclude=None if self.encoders else {"encoders"})
        for task in data["tasks"]:
            for name, absent in (("multiple", False), ("number", None)):
                if task[name] == absent:
                    del task[name]
        for name, usual in (("padding", "keep"), ("scale", "relative")):
            if data["image"] and data["image"][name] == usual:
                del data["image"][name]
        for encoder in data.get("encoders", {}).values():
            if not encoder["read"]:
                del encoder["read"]
        return sha256_json(data)

    def encoder(self, kind: Literal["image", "audio"]) -> EncoderSpec | None:
        """The pretrained encoder whose features models read in place of the patches or mel frames, if there is one."""
        found = self.encoders.get(kind)
        return found if found and found.read else None

    def image_positions(self, pictures: int) -> int:
        """Positions that so many pictures take up, at most."""
        encoder = self.encoder("image")
        return pictures * (encoder.tokens if encoder else self.image.tokens if self.image else 0)

    def audio_positions(self, frames: Sequence[int]) -> int:
        """Positions that sounds of so many mel frames take up; where an encoder's features are read, at most."""
        encoder = self.encoder("audio")
        if encoder:
            return len(frames) * encoder.tokens
        return sum(-(-n // self.audio.frames_per_token) for n in frames) if self.audio else 0

    @property
    def image_bytes(self) -> int:
        """Bytes that one stored picture takes at most, with its encoder's features; 0 where pictures are left out."""
        return self.image.size**2 * self.image.channels + self._encoded_bytes("image") if self.image else 0

    @property
    def audio_bytes(self) -> int:
        """Bytes that one stored sound takes at most, with its encoder's features; 0 where sounds are left out."""
        return self.audio.max_frames * self.audio.n_mels * 4 + self._encoded_bytes("audio") if self.audio else 0

    @property
    def video_bytes(self) -> int:
        """Bytes that one stored video (its frames and its sound) takes at most; 0 where videos are left out."""
        if not self.video:
            return 0
        return self.video.max_frames * self.image_bytes + (self.audio_bytes if self.video.sound else 0)

    def _encoded_bytes(self, kind: str) -> int:
        encoder = self.encoders.get(kind)
        return encoder.tokens * encoder.dim * 2 if encoder else 0

    def task(self, name: str) -> TaskSpec:
        return next(t for t in self.tasks if t.name == name)

    def label_offsets(self) -> dict[str, tuple[int, int]]:
        """task → (first, last + 1) row of its classes in the one head."""
        offsets, at = {}, 0
        for task in self.tasks:
            if task.labels:
                offsets[task.name] = (at, at + len(task.labels))
                at += len(task.labels)
        return offsets

    def number_rows(self) -> dict[str, int]:
        """task → the row of its standardised number in the head, behind all classes."""
        first = sum(len(task.labels) for task in self.tasks)
        return {task.name: first + n for n, task in enumerate(t for t in self.tasks if t.number)}

    @property
    def head_rows(self) -> int:
        """Rows of the head, at least one: a row for each class and each number of all tasks."""
        return max(sum(len(task.labels) + bool(task.number) for task in self.tasks), 1)


def save(spec: FeatureSpec, folder: Path) -> None:
    write_json(folder / FILE, spec.model_dump(mode="json"))


def load(folder: Path) -> FeatureSpec:
    """The spec stored in a shard set or checkpoint folder. Raises ArtifactError when it is not there."""
    import json

    try:
        data = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{folder} has no {FILE}", wanted="a shard set or a checkpoint") from None
    return parse(FeatureSpec, data, str(folder / FILE))


def require_same(model: FeatureSpec, shards: FeatureSpec) -> None:
    """Raise ArtifactError naming what differs, when a checkpoint was made for other features than these shards hold."""
    if model.digest == shards.digest:
        return
    a, b = model.model_dump(mode="json"), shards.model_dump(mode="json")
    if a["tokenizer_digest"] != b["tokenizer_digest"]:
        raise ArtifactError(
            f"the shards were made with tokenizer {b['tokenizer_digest'][:12]}",
            wanted=f"{a['tokenizer_digest'][:12]}, the checkpoint's",
            cure="give the shard set that the checkpoint was trained on, or train again",
        )
    different = ", ".join(key for key in a if a[key] != b[key])
    raise ArtifactError(
        f"the checkpoint's feature spec differs from the shards' in: {different}",
        wanted="the same feature spec",
        cure="give the shard set that the checkpoint was trained on, or train again",
    )
