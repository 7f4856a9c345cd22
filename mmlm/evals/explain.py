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
nothing is then what the encoder makes of the picture in its own mean colour, or of silence.

Axes: n points on the way, L position, D width, P patch, M mel token, K field, F frame.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch.nn import functional as F

from mmlm.data.borders import kept_patches
from mmlm.data.collate import IGNORE, Batch, collate, field_rows
from mmlm.errors import ConfigError, DataError
from mmlm.evals.answer import Answerer
from mmlm.evals.rollout import roll_out
from mmlm.features.sample import Sample
from mmlm.features.spec import ANSWER, AUDIO, EOS, FIELDS, IMAGE, PAD, SPECIAL_TOKENS, ImageSpec
from mmlm.model.sampling import words_only
from mmlm.model.transformer import Output

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
    Raises ConfigError when Captum is not installed or the task has no such label, DataError for a piece of a text.
    """
    if sample.answer_at < 0:
        raise DataError("a piece of a long text has no answer to explain", wanted="a question")
    of, answer = _wanted(answerer, sample, label, text)
    score = _LogProbability(answerer, sample, of, answer)
    if not score.inputs:
        raise DataError(
            f"the model reads nothing of this question that an answer could be put down to ({type(answerer.model).__name__})",
            wanted="a picture, a sound or fields, or a Transformer, lstm or gru, which read text",
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


def _wanted(answerer: Answerer, sample: Sample, label: str | None, text: str | None) -> tuple[str, str]:
    if label is not None and text is not None:
        raise ConfigError("both a label and a text to explain", wanted="one of them")
    task = next((t for t in answerer.spec.tasks if t.name == sample.task), None)
    labels = task.labels if task else []
    if label is not None and label not in labels:
        raise ConfigError(
            f"the task {sample.task} has no class {label!r}", wanted=f"one of {', '.join(labels[:20]) or 'none'}"
        )
    if label is not None:
        return "label", label
    if text is not None:
        return "text", text
    given = answerer.answer([sample])[0]
    if task is None or task.has_text:
        return "text", given.answer
    kind = "number" if task.number else "labels" if task.multiple else "label" if labels else "text"
    return kind, given.answer


def _integrate(
    score: _LogProbability, starts: dict[str, torch.Tensor], steps: int
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


class _LogProbability:
    """The score as a function of what enters the model: (n, …) tensors by name → (n,) log-probabilities."""

    def __init__(self, answerer: Answerer, sample: Sample, of: str, answer: str) -> None:
        self.model = cast(Any, answerer.model)
        self.spec, self.device, self.of = answerer.spec, answerer.device, of
        prompt = [*sample.tokens[: sample.answer_at].tolist(), ANSWER]
        own = [*answerer.tokenizer.encode(answer), EOS] if of == "text" else []
        self.sample = dataclasses.replace(sample, tokens=np.array([*prompt, *own], np.int32))
        self._batches: dict[int, Batch] = {}
        self.reads = hasattr(self.model, "tokens")
        """Whether the model reads text at all."""
        one = self.batch(1)
        self.answer, self.task = answer, sample.task
        number = self.spec.task(sample.task).number if of == "number" else None
        self.scale = number[1] if number else 1.0
        tokens_L = one.tokens_BT[one.valid_BT]
        where = int(one.answer_at_R[0])
        self.read = list(range(where, len(tokens_L) - 1)) if own else [where]
        """Positions whose next token, or whose class, is the answer."""
        self.prompt_text_L = (tokens_L >= len(SPECIAL_TOKENS)) & one.prompt_BT[one.valid_BT]
        with torch.no_grad():
            self.inputs: dict[str, torch.Tensor] = {}
            if self.reads:
                self.inputs["tokens"] = self.model.tokens(tokens_L)[None]
            if len(one.patches_PD):
                self.inputs["patches"] = one.patches_PD[None]
            if len(one.mels_MD):
                self.inputs["mels"] = one.mels_MD[None]
            if len(one.values_K):
                self.inputs["fields"] = self.model.fields(one.values_K[:, None], one.value_at_K)[None]

    def batch(self, n: int) -> Batch:
        """The question `n` times."""
        if n not in self._batches:
            self._batches[n] = collate([self.sample] * n, self.spec).to(self.device)
        return self._batches[n]

    @torch.no_grad()
    def starts(self, encode: Callable[[Sample], None] | None) -> dict[str, torch.Tensor]:
        """Where the way begins."""
        found: dict[str, torch.Tensor] = {}
        if self.reads:
            pad_D = self.model.tokens(torch.tensor(PAD, device=self.device))
            found["tokens"] = torch.where(self.prompt_text_L[None, :, None], pad_D, self.inputs["tokens"])
        if "patches" in self.inputs:  # standardised: 0 is the mean of the picture
            found["patches"] = torch.zeros_like(self.inputs["patches"])
        if "mels" in self.inputs and self.spec.audio:
            factor, offset = self.spec.audio.to_unit
            found["mels"] = torch.full_like(self.inputs["mels"], self.spec.audio.silence * factor + offset)
        found |= self._encoded_starts(encode)
        if "fields" in self.inputs and self.spec.fields:
            rows = field_rows(self.spec)
            at = torch.tensor([rows[(name, "missing")] for name in self.spec.fields.names], device=self.device)
            found["fields"] = self.model.fields(torch.ones(len(at), 1, device=self.device), at)[None]
        return found

    def _encoded_starts(self, encode: Callable[[Sample], None] | None) -> dict[str, torch.Tensor]:
        """What the pretrained encoders make of pictures and sounds that say nothing."""
        read = {"patches": self.spec.encoder("image"), "mels": self.spec.encoder("audio")}
        names = [name for name, encoder in read.items() if encoder and name in self.inputs]
        if not names:
            return {}
        if encode is None:
            raise ConfigError(
                "the model reads what pretrained encoders make of pictures and sounds, and none is given",
                wanted="`encode`, which makes their features",
            )
        silence = self.spec.audio.silence if self.spec.audio else 0.0
        empty = dataclasses.replace(
            self.sample,
            images=[_of_one_colour(picture) for picture in self.sample.images],
            sounds=[np.full_like(mel, silence) for mel in self.sample.sounds],
            features={},
        )
        encode(empty)
        batch = collate([empty], self.spec).to(self.device)
        rows = {"patches": batch.patches_PD, "mels": batch.mels_MD}
        return {name: rows[name][None] for name in names}

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        given = dict(zip(self.inputs, inputs, strict=True))
        n = len(inputs[0])
        batch = self.batch(n)
        if "patches" in given:
            batch = dataclasses.replace(batch, patches_PD=given["patches"].flatten(0, 1))
        if "mels" in given:
            batch = dataclasses.replace(batch, mels_MD=given["mels"].flatten(0, 1))
        with self._embedding(given.get("tokens")), _giving(self.model.fields, given.get("fields")):
            output: Output = self.model(batch)
        return self._text(output, batch, n) if self.of == "text" else self._head(output.label_RC.float())

    @contextmanager
    def _embedding(self, tokens_NLD: torch.Tensor | None) -> Iterator[None]:
        """In here the model reads `tokens_NLD`. It may embed parts of a sequence, as often as its fusion wants."""
        if tokens_NLD is None:
            yield
            return
        flat, own = tokens_NLD.flatten(0, 1), self.model.embed

        def embed(batch: Batch, keep_BT: torch.Tensor, *more: Any, **named: Any) -> torch.Tensor:
            with _giving(self.model.tokens, flat[keep_BT.flatten()]):
                made: torch.Tensor = own(batch, keep_BT, *more, **named)
            return made

        self.model.embed = embed
        try:
            yield
        finally:
            del self.model.embed

    def _head(self, head_NC: torch.Tensor) -> torch.Tensor:
        task = self.spec.task(self.task)
        if self.of == "number" and task.number:
            return head_NC[:, self.spec.number_rows()[self.task]] * task.number[1] + task.number[0]
        first, last = self.spec.label_offsets()[self.task]
        own_NC = head_NC[:, first:last]
        if self.of == "label":
            each_NC = F.logsigmoid(own_NC) if task.multiple else own_NC.log_softmax(-1)
            return each_NC[:, task.labels.index(self.answer)]
        held_C = torch.tensor([label in self.answer.split(", ") for label in task.labels], device=self.device)
        return F.logsigmoid(torch.where(held_C, own_NC, -own_NC)).sum(1)

    def _text(self, output: Output, batch: Batch, n: int) -> torch.Tensor:
        log_AV = words_only(output.answer_AV.float()).log_softmax(-1)
        targets_A = batch.target_BT[batch.target_BT != IGNORE]
        return log_AV.gather(1, targets_A[:, None]).view(n, -1).sum(1)


@contextmanager
def _giving(module: torch.nn.Module | None, rows: torch.Tensor | None) -> Iterator[None]:
    """In here `module` gives `rows`, (…, D), whatever it is asked; what it makes beyond them stays."""
    if module is None or rows is None:
        yield
        return
    flat = rows.flatten(0, -2)

    def replace(_: Any, __: Any, made: torch.Tensor) -> torch.Tensor:
        return torch.cat([flat, made[len(flat) :]]).view_as(made)

    handle = module.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


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
                kept = kept_patches(picture, spec.image)
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
    """Tokens of a run of text; those that are parts of one character go together."""
    begin = 0
    for end in range(1, len(run) + 1):
        text = decode([int(opened[i]) for i in run[begin:end]])
        if "\ufffd" in text and end < len(run) and end - begin < 8:
            continue
        here = list(run[begin:end])
        share = None if rows_L is None else float(rows_L[here].sum())
        yield TextPart(text, len(here), float(text_L[here].sum()), share)
        begin = end


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


def _of_one_colour(picture_HWC: np.ndarray) -> np.ndarray:
    """The picture's own mean colour everywhere."""
    mean_C = picture_HWC.mean((0, 1), keepdims=True)
    return np.broadcast_to(np.rint(mean_C), picture_HWC.shape).astype(np.uint8)


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
