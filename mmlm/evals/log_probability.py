"""The score that an explanation follows, as a function of what enters the model.

Text enters as embedded tokens. A BERT-style encoder embeds the tokens of a question by its own table and reads no marks,
whose rows here are 0 and stay so.

Axes: N copies of the question, T position of a batch, L position of the question, D width, R record, C class, A answer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import numpy as np
import torch
from torch.nn import functional as F

from mmlm.data.collate import IGNORE, Batch, collate, field_rows
from mmlm.errors import ConfigError
from mmlm.evals.answer import Answerer
from mmlm.features.sample import Sample
from mmlm.features.spec import ANSWER, EOS, PAD, SPECIAL_TOKENS, ImageSpec
from mmlm.model.huggingface.encoder import MOVED, EncoderModel
from mmlm.model.sampling import words_only
from mmlm.model.transformer import Output


class LogProbability:
    """The score as a function of what enters the model: (n, …) tensors by name → (n,) log-probabilities."""

    def __init__(self, answerer: Answerer, sample: Sample, of: str, answer: str, held: Collection[str] = ()) -> None:
        """`held`: where `of` is `labels`, the classes that hold."""
        self.model = cast(Any, answerer.model)
        self.spec, self.device, self.of = answerer.spec, answerer.device, of
        prompt = [*sample.tokens[: sample.answer_at].tolist(), ANSWER]
        own = [*answerer.tokenizer.encode(answer), EOS] if of == "text" else []
        self.sample = dataclasses.replace(sample, tokens=np.array([*prompt, *own], np.int32))
        self._batches: dict[int, Batch] = {}
        self.reads = isinstance(self.model, EncoderModel) or hasattr(self.model, "tokens")
        """Whether the model reads text at all."""
        one = self.batch(1)
        self.answer, self.held, self.task = answer, held, sample.task
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
                self.inputs["tokens"] = self._embedded(tokens_L)[None]
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

    def _embedded(self, tokens_L: torch.Tensor) -> torch.Tensor:
        """(L, D)."""
        if not isinstance(self.model, EncoderModel):
            return cast(torch.Tensor, self.model.tokens(tokens_L))
        words_LD = self.model.words((tokens_L - MOVED).clamp_min(0))
        return torch.where(self.prompt_text_L[:, None], words_LD, 0.0)

    def _pad(self) -> torch.Tensor:
        """(D,): what says nothing in place of a token."""
        if isinstance(self.model, EncoderModel):
            return self.model.words.weight[self.model.padding]
        return cast(torch.Tensor, self.model.tokens(torch.tensor(PAD, device=self.device)))

    @torch.no_grad()
    def starts(self, encode: Callable[[Sample], None] | None) -> dict[str, torch.Tensor]:
        """Where the way begins."""
        found: dict[str, torch.Tensor] = {}
        if self.reads:
            found["tokens"] = torch.where(self.prompt_text_L[None, :, None], self._pad(), self.inputs["tokens"])
        if "patches" in self.inputs and self.spec.image:
            found["patches"] = _of_mean_colour(self.inputs["patches"], self.batch(1).patch_at_P, self.spec.image)
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
        fields = getattr(self.model, "fields", None)
        with self._embedding(given.get("tokens")), _giving(fields, given.get("fields")):
            output: Output = self.model(batch)
        return self._text(output, batch, n) if self.of == "text" else self._head(output.label_RC.float())

    def _embedding(self, tokens_NLD: torch.Tensor | None) -> AbstractContextManager[None]:
        """In here the model reads `tokens_NLD`."""
        if tokens_NLD is None:
            return nullcontext()
        if isinstance(self.model, EncoderModel):
            return _giving_words(self.model.words, tokens_NLD[:, self.prompt_text_L])
        return _embedding(self.model, tokens_NLD.flatten(0, 1))

    def _head(self, head_NC: torch.Tensor) -> torch.Tensor:
        task = self.spec.task(self.task)
        if self.of == "number" and task.number:
            return head_NC[:, self.spec.number_rows()[self.task]] * task.number[1] + task.number[0]
        first, last = self.spec.label_offsets()[self.task]
        own_NC = head_NC[:, first:last]
        if self.of == "label":
            each_NC = F.logsigmoid(own_NC) if task.multiple else own_NC.log_softmax(-1)
            return each_NC[:, task.labels.index(self.answer)]
        held_C = torch.tensor([label in self.held for label in task.labels], device=self.device)
        return F.logsigmoid(torch.where(held_C, own_NC, -own_NC)).sum(1)

    def _text(self, output: Output, batch: Batch, n: int) -> torch.Tensor:
        log_AV = words_only(output.answer_AV.float()).log_softmax(-1)
        targets_A = batch.target_BT[batch.target_BT != IGNORE]
        return log_AV.gather(1, targets_A[:, None]).view(n, -1).sum(1)


@contextmanager
def _embedding(model: Any, flat: torch.Tensor) -> Iterator[None]:
    """In here `model` reads these rows for tokens. It may embed parts of a sequence, as often as its fusion wants."""
    own = model.embed

    def embed(batch: Batch, keep_BT: torch.Tensor, *more: Any, **named: Any) -> torch.Tensor:
        with _giving(model.tokens, flat[keep_BT.flatten()]):
            made: torch.Tensor = own(batch, keep_BT, *more, **named)
        return made

    model.embed = embed
    try:
        yield
    finally:
        del model.embed


@contextmanager
def _giving_words(table: torch.nn.Module, text_NLD: torch.Tensor) -> Iterator[None]:
    """In here `table` gives these rows between an encoder's own begin and end."""
    after = 1 + text_NLD.shape[1]

    def replace(_: Any, __: Any, made_RLD: torch.Tensor) -> torch.Tensor:
        return torch.cat([made_RLD[:, :1], text_NLD, made_RLD[:, after:]], 1)

    handle = table.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


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


def _of_mean_colour(patches_1PD: torch.Tensor, at_P: torch.Tensor, spec: ImageSpec) -> torch.Tensor:
    """Every patch in the mean colour of its picture; on a relative scale in its mean, which is 0 there."""
    made_1PD = torch.zeros_like(patches_1PD)
    if spec.scale == "fixed":
        for picture in (at_P // spec.tokens).unique():
            here_P = at_P // spec.tokens == picture
            pixels_NC = patches_1PD[0, here_P].reshape(-1, spec.channels)
            made_1PD[0, here_P] = pixels_NC.mean(0).repeat(spec.patch**2)
    return made_1PD


def _of_one_colour(picture_HWC: np.ndarray) -> np.ndarray:
    """The picture's own mean colour everywhere."""
    mean_C = picture_HWC.mean((0, 1), keepdims=True)
    return np.broadcast_to(np.rint(mean_C), picture_HWC.shape).astype(np.uint8)
