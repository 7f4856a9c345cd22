"""Answerer: a checkpoint that answers samples. Evaluation, the command line and the served model all use this one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mmlm.data.collate import collate
from mmlm.data.modalities import keep_modalities
from mmlm.errors import ConfigError
from mmlm.evals.read_head import read_head
from mmlm.features import spec as feature_spec
from mmlm.features.borders import picture_positions
from mmlm.features.sample import Sample
from mmlm.features.spec import AUDIO, FIELDS, IMAGE, FeatureSpec
from mmlm.features.text import Tokenizer
from mmlm.model.answers import Answers
from mmlm.model.generation import generate, stream
from mmlm.model.generation_config import GREEDY, GenerationConfig
from mmlm.model.pieces import cut
from mmlm.model.transformer import count_parameters
from mmlm.train import weights


@dataclass(slots=True)
class Answer:
    """`answer` is the text; `score` its probability in [0, 1], None for a number, which has none; `label` the most likely
    class of the sample's task, `labels` those that hold where several may, `number` the number that is asked for. `error`
    says why the answer is not what was asked for."""

    answer: str
    score: float | None
    label: str | None
    label_scores: dict[str, float]
    labels: list[str] | None = None
    number: float | None = None
    error: str | None = None


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
        generation: GenerationConfig = GREEDY,
    ) -> list[Answer]:
        """One Answer per sample, in order. `given` names the modalities that are kept; `limit` the longest
        answer, tokens; by default what `generation` says, else what the longest sequence of the shards leaves room for.

        A task with classes or a number, and without answer texts of its own, is answered by the head unless `generation`
        has choices or a JSON schema, every other by generation. Raises ConfigError for a schema that cannot be followed, and
        for either of a model that generates nothing.
        """
        rows = [s if given is None else keep_modalities(s, given) for s in samples]
        order = np.argsort([prompt_length(s, self.spec) for s in rows], kind="stable")
        answers: list[Answer | None] = [None] * len(rows)
        for first in range(0, len(rows), batch_size):
            chosen = order[first : first + batch_size]
            for i, answer in zip(chosen, self._batch([rows[i] for i in chosen], generation, limit), strict=True):
                answers[i] = answer
        return [a for a in answers if a is not None]

    def stream(self, sample: Sample, generation: GenerationConfig = GREEDY) -> Iterator[str | Answer]:
        """The answer in pieces of text, as soon as they are certain, and then the Answer, whose text they make up."""
        batch = collate([sample], self.spec, pad_left=True, with_answer=False).to(self.device)
        limit, seeds = self._limit([sample], generation, None), [_seed(generation, sample)]
        for made in stream(self.model, batch, limit, generation, words=self.tokenizer, seeds=seeds):
            if isinstance(made, Answers):
                answer = self._answers([sample], made, generation)[0]
                if not limit:
                    yield answer.answer
                yield answer
            else:
                yield made[1]

    def _batch(self, samples: Sequence[Sample], generation: GenerationConfig, limit: int | None) -> list[Answer]:
        batch = collate(samples, self.spec, pad_left=True, with_answer=False).to(self.device)
        made = generate(
            self.model, batch, self._limit(samples, generation, limit), generation, words=self.tokenizer,
            seeds=[_seed(generation, sample) for sample in samples],
        )  # fmt: skip
        return self._answers(samples, made, generation)

    def _answers(self, samples: Sequence[Sample], made: Answers, generation: GenerationConfig) -> list[Answer]:
        answers = []
        rows = zip(samples, made.ids, made.log_score_R.tolist(), made.label_RC.cpu(), strict=True)
        for sample, tokens, log, head in rows:
            said = read_head(head, sample.task, self.spec)
            label, scores, labels = (said.label, said.label_scores, said.labels) if said else (None, {}, None)
            if said is not None and not self._in_words(sample.task, generation):
                answers.append(Answer(said.answer, said.score, label, scores, labels, said.number))
            else:
                words = cut(self.tokenizer.decode(tokens), generation.stop)
                wrong = _unfinished(words, len(tokens)) if generation.json_schema is not None else None
                answers.append(Answer(words, float(np.exp(log)), label, scores, labels, error=wrong))
        return answers

    def _in_words(self, task: str, generation: GenerationConfig) -> bool:
        """Whether the answer is generated, not read off the head."""
        asked = generation.constrained or any(t.has_text for t in self.spec.tasks if t.name == task)
        return self.model.generates and asked

    def _limit(self, samples: Sequence[Sample], generation: GenerationConfig, limit: int | None) -> int:
        """Tokens of the longest answer. No tokens need generating where the head gives every answer; choices need as many
        as they have bytes, at most."""
        if generation.constrained and not self.model.generates:
            raise ConfigError(
                f"choices or a JSON schema for a model that writes nothing ({type(self.model).__name__})",
                wanted="a model with words: transformer (not layout encoder, nor a BERT-style one), lstm or gru",
                cure="ask without them: its head answers with one of the task's classes",
            )  # fmt: skip
        headed = {t.name for t in self.spec.tasks if (t.labels or t.number) and not self._in_words(t.name, generation)}
        if not self.model.generates or all(s.task in headed for s in samples):
            return 0
        if generation.choices:
            return max(len(choice.encode()) for choice in generation.choices) + 1
        return limit or generation.max_tokens or max(48, self.spec.max_len)


def _seed(generation: GenerationConfig, sample: Sample) -> int:
    """Of what is drawn for one record: not of its place among others."""
    return int.from_bytes(hashlib.sha256(f"{generation.seed} {sample.id}".encode()).digest()[:8], "little")


def _unfinished(words: str, tokens: int) -> str | None:
    try:
        json.loads(words)
    except ValueError:
        return f"after {tokens} tokens the JSON was not complete; raise generation.max_tokens, or bound the schema"
    return None


def prompt_length(sample: Sample, spec: FeatureSpec) -> int:
    """Positions of the opened prompt; batches of similar length waste least."""
    prompt = sample.tokens[: sample.answer_at]
    length = len(prompt)
    if spec.image:
        pictures = int((prompt == IMAGE).sum())
        length += picture_positions(sample, spec) - pictures
    if spec.audio and (prompt == AUDIO).any():
        length += spec.audio_positions([len(x) for x in sample.sounds]) - len(sample.sounds)
    if spec.fields:
        length += int((prompt == FIELDS).sum()) * (len(spec.fields.names) - 1)
    return length
