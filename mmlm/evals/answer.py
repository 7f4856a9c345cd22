"""Answerer: a checkpoint that answers samples. Evaluation, the command line and the served model all use this one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mmlm.data.collate import collate, mel_tokens
from mmlm.data.modalities import keep_modalities
from mmlm.evals.read_head import read_head
from mmlm.features import spec as feature_spec
from mmlm.features.sample import Sample
from mmlm.features.spec import AUDIO, FIELDS, IMAGE, FeatureSpec
from mmlm.features.text import Tokenizer
from mmlm.model.generation import generate
from mmlm.model.transformer import count_parameters
from mmlm.train import weights


@dataclass(slots=True)
class Answer:
    """`answer` is the text; `score` its probability in [0, 1], None for a number, which has none; `label` the most likely
    class of the sample's task, `labels` those that hold where several may, `number` the number that is asked for."""

    answer: str
    score: float | None
    label: str | None
    label_scores: dict[str, float]
    labels: list[str] | None = None
    number: float | None = None


class Answerer:
    """Loads `model.safetensors`, `config.json`, `feature_spec.json` and `tokenizer.json` of a checkpoint folder.

    Runs in float32: scores then move by less than 1e-4 with the batch size. Raises ArtifactError when a file is
    missing or does not fit.
    """

    def __init__(self, folder: Path | str, device: str = "cpu") -> None:
        self.folder = Path(folder)
        self.spec: FeatureSpec = feature_spec.load(self.folder)
        self.tokenizer = Tokenizer.load(self.folder)
        self.device = torch.device(device)
        self.model = weights.load_model(self.folder, self.spec).float().eval().to(self.device)
        self.parameters = count_parameters(self.model)

    def answer(
        self,
        samples: Iterable[Sample],
        *,
        batch_size: int = 128,
        given: frozenset[str] | None = None,
        limit: int | None = None,
    ) -> list[Answer]:
        """One Answer per sample, in order. `given` names the modalities that are kept; `limit` the longest
        answer, tokens; by default what the longest sequence of the shards leaves room for.

        A task with classes or a number, and without answer texts of its own, is answered by the head, every other by
        generation.
        """
        limit = limit or max(48, self.spec.max_len)
        rows = [s if given is None else keep_modalities(s, given) for s in samples]
        order = np.argsort([prompt_length(s, self.spec) for s in rows], kind="stable")
        answers: list[Answer | None] = [None] * len(rows)
        for first in range(0, len(rows), batch_size):
            chosen = order[first : first + batch_size]
            for i, answer in zip(chosen, self._batch([rows[i] for i in chosen], limit), strict=True):
                answers[i] = answer
        return [a for a in answers if a is not None]

    def _batch(self, samples: Sequence[Sample], limit: int) -> list[Answer]:
        batch = collate(samples, self.spec, pad_left=True, with_answer=False).to(self.device)
        with torch.inference_mode():
            ids, log_score, label_logits = generate(self.model, batch, self._limit(samples, limit))
        answers = []
        for sample, tokens, log, head in zip(samples, ids, log_score.tolist(), label_logits.cpu(), strict=True):
            said = read_head(head, sample.task, self.spec)
            label, scores, labels = (said.label, said.label_scores, said.labels) if said else (None, {}, None)
            if said is not None and not self._has_text(sample.task):
                answers.append(Answer(said.answer, said.score, label, scores, labels, said.number))
            else:
                words = self.tokenizer.decode(tokens).strip()
                answers.append(Answer(words, float(np.exp(log)), label, scores, labels))
        return answers

    def _has_text(self, task: str) -> bool:
        return any(t.has_text for t in self.spec.tasks if t.name == task)

    def _limit(self, samples: Sequence[Sample], limit: int) -> int:
        """No tokens need generating where the head gives every answer."""
        headed = {t.name for t in self.spec.tasks if (t.labels or t.number) and not t.has_text}
        return 0 if all(s.task in headed for s in samples) else limit


def prompt_length(sample: Sample, spec: FeatureSpec) -> int:
    """Positions of the opened prompt; batches of similar length waste least."""
    prompt = sample.tokens[: sample.answer_at]
    length = len(prompt)
    if spec.image:
        length += int((prompt == IMAGE).sum()) * (spec.image.tokens - 1)
    if spec.audio and (prompt == AUDIO).any():
        length += sum(mel_tokens(len(x), spec.audio) - 1 for x in sample.sounds)
    if spec.fields:
        length += int((prompt == FIELDS).sum()) * (len(spec.fields.names) - 1)
    return length
