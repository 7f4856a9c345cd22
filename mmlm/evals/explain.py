"""Explain: what of a question its answer rests on, by integrated gradients (Sundararajan, Taly & Yan 2017) with Captum.

What is explained is the log-probability (nats) of an answer: of a class among those of its task, of a set of classes that
hold together, or of a text, token by token; of a number, it is the number itself. It is followed along the straight way
from a question that says nothing to the real one. Saying nothing is: a picture in its own mean colour, a sound of
silence, a field that is missing, and `<pad>`, which no model ever learns from, for each token of text. Marks stay as they
are, and so does the answer's own text.

Attributions are made where a modality enters: at every pixel and every mel bin, which summed over a patch or a frame is
what the embedded patch would be given where the stem is linear; and at the embedded tokens and fields. They add up to the
difference of the two log-probabilities (completeness); how well is measured, and more steps are taken until it is.

Of a model that reads a pretrained encoder's features they are made at those, and summed over each of its tokens; saying
nothing is then what the encoder makes of the picture in its own mean colour, or of silence. A BERT-style encoder of text has
its own table of tokens, and its own padding says nothing.

Axes: n points on the way, L position, D width, P patch, M mel token, K field, F frame.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from mmlm.data.collate import Batch
from mmlm.errors import ConfigError, DataError
from mmlm.evals.answer import Answerer
from mmlm.evals.log_probability import LogProbability
from mmlm.evals.rollout import roll_out
from mmlm.features.borders import kept_patches
from mmlm.features.sample import Sample
from mmlm.features.spec import ANSWER, AUDIO, FIELDS, IMAGE, SPECIAL_TOKENS, ImageSpec

STEPS = 64
"""Points on the way at first (Gauss-Legendre); doubled up to MOST while the sum is off by more than the tolerance."""
MOST = 512
AT_ONCE = 16
"""Points of one forward and backward pass."""
RELATIVE, ABSOLUTE = 0.02, 0.01
"""The sum may be off by 2 % of the difference, or by 0.01 where that is more: nats, or standard deviations of a number."""


@dataclass
class TextPart:
    """A token, or as many as make whole characters."""

    text: str
    tokens: int
    attribution: float
    rollout: float | None = None


@dataclass
class PicturePart:
    picture_HWC: np.ndarray
    """uint8, as the model sees it, or as its encoder does."""
    pixels_HW: np.ndarray | None
    """None where an encoder's features are read."""
    patches: np.ndarray
    """(rows, columns): the sum over the pixels of each patch, or over the features of each of an encoder's tokens."""
    rollout: np.ndarray | None = None
    """(rows, columns)."""
    rest: float = 0.0
    """The sum over an encoder's tokens that have no place in the picture, such as its class token."""

    @property
    def attribution(self) -> float:
        return float(self.patches.sum()) + self.rest


@dataclass
class SoundPart:
    mel_FM: np.ndarray
    """Log-mel frames as stored."""
    bins_FM: np.ndarray | None
    """None where an encoder's features are read."""
    frames: np.ndarray
    """(F,): the sum over the mel bins of each frame; of an encoder's token, shared out evenly among its frames."""
    frame_seconds: float
    rollout: np.ndarray | None = None
    """(mel tokens,), each of `frames_per_token` frames, or an encoder's tokens."""

    @property
    def attribution(self) -> float:
        return float(self.frames.sum())


@dataclass
class FieldPart:
    name: str
    value: float | str | None
    attribution: float
    rollout: float | None = None


Part = TextPart | PicturePart | SoundPart | FieldPart
KINDS: dict[type, str] = {TextPart: "text", PicturePart: "image", SoundPart: "audio", FieldPart: "fields"}


@dataclass
class Explanation:
    answer: str
    """What was explained: a class, classes, a number or a text."""
    of: str
    """`label`, `labels`, `number` or `text`."""
    score: float
    """Log-probability of it, nats; of a number, its value."""
    start: float
    """The same where the question says nothing."""
    delta: float
    """How much the attributions add up to more than `score` - `start`."""
    steps: int
    rolled_out: bool
    """Whether the model has the attention that a roll-out follows."""
    parts: list[Part] = field(default_factory=list)
    """In order of the question."""
    scale: float = 1.0
    """Of a number: its standard deviation."""

    @property
    def unit(self) -> str:
        """Of attributions and scores: "nats"; "" of a number, whose own unit is not known."""
        return "" if self.of == "number" else "nats"

    @property
    def tolerance(self) -> float:
        return tolerance(self.score - self.start, self.scale)

    @property
    def complete(self) -> bool:
        return abs(self.delta) <= self.tolerance

    @property
    def by_modality(self) -> dict[str, float]:
        """text, image, audio, fields → summed attribution, of what was given."""
        sums: dict[str, float] = {}
        for part in self.parts:
            sums[KINDS[type(part)]] = sums.get(KINDS[type(part)], 0.0) + part.attribution
        return sums


def tolerance(difference: float, scale: float) -> float:
    """How much the sum of the attributions may be off."""
    return max(ABSOLUTE * scale, RELATIVE * abs(difference))


def explain(
    answerer: Answerer,
    sample: Sample,
    *,
    label: str | None = None,
    text: str | None = None,
    steps: int = STEPS,
    encode: Callable[[Sample], None] | None = None,
) -> Explanation:
    """Explain the answer that `answerer` gives to `sample`, or another `label` or `text` as if it were given.

    `encode` puts the features of pretrained encoders into a sample; wanted where the model reads such features.
    Raises ConfigError when Captum is not installed, the task has no such label or the model writes no text, DataError for a
    piece of a text.
    """
    if sample.answer_at < 0:
        raise DataError("a piece of a long text has no answer to explain", wanted="a question")
    of, answer, held = _wanted(answerer, sample, label, text)
    score = LogProbability(answerer, sample, of, answer, held)
    if not score.inputs:
        raise DataError(
            f"the model reads nothing of this question that an answer could be put down to ({type(answerer.model).__name__})",
            wanted="a picture, a sound or fields, or a model that reads text: any but a cnn",
        )
    starts = score.starts(encode)
    found = list(score.inputs)
    values, steps, total = _integrate(score, starts, max(2, steps))
    with torch.no_grad():
        rolled = roll_out(answerer.model, score.batch(1))
        begin, end = (float(score(*(x[name] for name in found))) for x in (starts, score.inputs))
    rows = None if rolled is None else rolled[score.read].mean(0).numpy()
    parts = list(_parts(sample, score.batch(1), answerer, values, rows))
    return Explanation(answer, of, end, begin, total - (end - begin), steps, rows is not None, parts, score.scale)


def _wanted(answerer: Answerer, sample: Sample, label: str | None, text: str | None) -> tuple[str, str, Sequence[str]]:
    """What is explained, as text, its kind before it and behind it the classes that hold, where several may."""
    if label is not None and text is not None:
        raise ConfigError("both a label and a text to explain", wanted="one of them")
    task = next((t for t in answerer.spec.tasks if t.name == sample.task), None)
    labels = task.labels if task else []
    if label is not None and label not in labels:
        raise ConfigError(
            f"the task {sample.task} has no class {label!r}", wanted=f"one of {', '.join(labels[:20]) or 'none'}"
        )
    if label is not None:
        return "label", label, ()
    if text is not None:
        _require_words(answerer, sample, labels)
        return "text", text, ()
    given = answerer.answer([sample])[0]
    written = task is None or (task.has_text and answerer.model.generates)
    kind = "number" if task and task.number else "labels" if task and task.multiple else "label" if labels else "text"
    if written or kind == "text":
        _require_words(answerer, sample, labels)
        return "text", given.answer, ()
    return kind, given.answer, given.labels or ()


def _require_words(answerer: Answerer, sample: Sample, labels: Sequence[str]) -> None:
    if not answerer.model.generates:
        raise ConfigError(
            f"a text is to be explained of a model that writes nothing ({type(answerer.model).__name__})",
            wanted=f"a class of the task {sample.task}: {', '.join(labels[:20])}" if labels else "its number",
            cure="name one with --label, or ask without --answer" if labels else "ask without --answer",
        )


def _integrate(
    score: LogProbability, starts: dict[str, torch.Tensor], steps: int
) -> tuple[dict[str, np.ndarray], int, float]:
    """Attributions by name, without the axis of points; the steps that were taken; their sum."""
    try:
        from captum.attr import IntegratedGradients
    except ImportError:
        raise ConfigError(
            "explaining an answer needs captum, which is not installed", cure="pip install 'mmlm-workflows[explain]'"
        ) from None
    names = list(score.inputs)
    inputs, baselines = tuple(score.inputs[n] for n in names), tuple(starts[n] for n in names)
    while True:
        made, delta = IntegratedGradients(score).attribute(
            inputs, baselines, n_steps=steps, internal_batch_size=AT_ONCE, return_convergence_delta=True
        )
        with torch.no_grad():
            difference = float(score(*inputs) - score(*baselines))
        if abs(float(delta)) <= tolerance(difference, score.scale) or 2 * steps > MOST:
            values = {n: x[0].detach().cpu().double().numpy() for n, x in zip(names, made, strict=True)}
            return values, steps, float(sum(x.sum() for x in values.values()))
        steps *= 2


def _parts(
    sample: Sample, one: Batch, answerer: Answerer, values: dict[str, np.ndarray], rows_L: np.ndarray | None
) -> Iterator[Part]:
    """What was given, in order of the question, each with its share of every attribution."""
    spec = answerer.spec
    opened = one.tokens_BT[one.valid_BT].cpu().numpy()
    text_L = values["tokens"].sum(-1) if "tokens" in values else np.zeros(len(opened))
    seen = dict.fromkeys((IMAGE, AUDIO, FIELDS), 0)
    rows_before = dict.fromkeys((IMAGE, AUDIO, FIELDS), 0)
    position = 0
    run: list[int] = []

    def rolled(count: int) -> np.ndarray | None:
        return None if rows_L is None else rows_L[position : position + count]

    for token in [*sample.tokens[: sample.answer_at].tolist(), ANSWER]:
        if token not in seen:
            if token >= len(SPECIAL_TOKENS):
                run.append(position)
            elif run:
                yield from _spans(run, opened, text_L, rows_L, answerer.tokenizer.decode)
                run = []
            position += 1
            continue
        yield from _spans(run, opened, text_L, rows_L, answerer.tokenizer.decode)
        run = []
        first = rows_before[token]
        if token == IMAGE and spec.image:
            picture = sample.images[seen[token]]
            if spec.encoder("image"):
                count = len(sample.features["image"][seen[token]])
                yield _encoded_picture(picture, values["patches"][first : first + count].sum(1), rolled(count))
            else:
                kept = kept_patches(sample, spec.image)[seen[token]]
                count = len(kept)
                yield _picture(picture, kept, values["patches"][first : first + count], spec.image, rolled(count))
        elif token == AUDIO and spec.audio:
            mel, frame_seconds = sample.sounds[seen[token]], spec.audio.hop / spec.audio.sample_rate
            if spec.encoder("audio"):
                count = len(sample.features["audio"][seen[token]])
                frames = _shared_out(values["mels"][first : first + count].sum(1), len(mel))
                yield SoundPart(mel, None, frames, frame_seconds, rolled(count))
            else:
                count = -(-len(mel) // spec.audio.frames_per_token)
                bins = values["mels"][first : first + count].reshape(-1, spec.audio.n_mels)[: len(mel)]
                yield SoundPart(mel, bins, bins.sum(1), frame_seconds, rolled(count))
        else:
            names = spec.fields.names if spec.fields else []
            count, each = len(names), rolled(len(names))
            for n, name in enumerate(names):
                share = None if each is None else float(each[n])
                yield FieldPart(name, sample.fields.get(name), float(values["fields"][first + n].sum()), share)
        seen[token] += 1
        rows_before[token] += count
        position += count


def _spans(
    run: Sequence[int], opened: np.ndarray, text_L: np.ndarray, rows_L: np.ndarray | None, decode: Callable[..., str]
) -> Iterator[TextPart]:
    """Tokens of a run of text; those that are parts of one character go together. Each is decoded behind the one before,
    which tells whether a space stands between them."""
    ids = [int(opened[i]) for i in run]
    before, begin = 0, 0
    for end in range(1, len(run) + 1):
        text = _behind(decode, ids[before:begin], ids[begin:end])
        if "\ufffd" in text and end < len(run) and end - begin < 8:
            continue
        here = list(run[begin:end])
        share = None if rows_L is None else float(rows_L[here].sum())
        yield TextPart(text, len(here), float(text_L[here].sum()), share)
        before, begin = begin, end


def _behind(decode: Callable[..., str], before: list[int], ids: list[int]) -> str:
    """What `ids` add to the text of `before`; their own text where they change it, as bytes that are no character may."""
    known, both = decode(before), decode([*before, *ids])
    return both[len(known) :] if both.startswith(known) else decode(ids)


def _picture(
    picture_HWC: np.ndarray, kept: np.ndarray, patches_PD: np.ndarray, spec: ImageSpec, rolled_P: np.ndarray | None
) -> PicturePart:
    """`kept`: places of the patches that the model was given; the others count nothing."""
    p, n = spec.patch, spec.size // spec.patch
    whole = np.zeros((spec.tokens, spec.patch_dim))
    whole[kept] = patches_PD
    each = whole.reshape(n, n, p, p, spec.channels)
    pixels = each.transpose(0, 2, 1, 3, 4).sum(-1).reshape(n * p, n * p)
    rolled = np.zeros(spec.tokens)
    if rolled_P is not None:
        rolled[kept] = rolled_P
    grid = None if rolled_P is None else rolled.reshape(n, n)
    return PicturePart(picture_HWC, pixels, each.sum((2, 3, 4)), grid)


def _encoded_picture(picture_HWC: np.ndarray, each_P: np.ndarray, rolled_P: np.ndarray | None) -> PicturePart:
    """An encoder's tokens as a square grid; tokens of the whole picture come before those of its places, if any do."""
    n = math.isqrt(len(each_P))
    first = len(each_P) - n * n
    grid = None if rolled_P is None else rolled_P[first:].reshape(n, n)
    return PicturePart(picture_HWC, None, each_P[first:].reshape(n, n), grid, float(each_P[:first].sum()))


def _shared_out(each_M: np.ndarray, frames: int) -> np.ndarray:
    """(frames,): each token's sum, in equal parts on the frames that it stands for."""
    token_F = np.arange(frames) * len(each_M) // max(frames, 1)
    return each_M[token_F] / np.bincount(token_F, minlength=len(each_M))[token_F]
