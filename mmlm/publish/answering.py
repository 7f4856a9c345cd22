"""Responder: answers questions of text, picture and sound; one for the command line, the server and the bundle.

A question is `{"text": str, "image": bytes | path, "audio": bytes | path, "fields": {name: number | category}}`, every key
optional, `image` and `audio` also lists of such, with `generation` (GenerationConfig) for how it is to be worded, and with
`adapter` for which one answers, or `none`, where the model has adapters; or `{"messages": [...]}`, as a corpus of chats has
them (asked_chat.py). Any other key is refused. An answer is
`{"answer": str, "score": float, "label_scores": {label: float}}`, or `{"error": sentence}`; with `labels` where several
may hold, and with `number` (which has no score: null) where one is asked for.
"""

from __future__ import annotations

import os
import threading
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmlm.corpus.records import Part, Record
from mmlm.errors import ConfigError, DataError, MmlmError
from mmlm.evals.answer import Answer, Answerer
from mmlm.evals.embed import embed
from mmlm.features.encode import Encoder
from mmlm.features.sample import Sample
from mmlm.features.spec import FeatureSpec, TaskSpec
from mmlm.model import adapters
from mmlm.model.generation_config import GenerationConfig
from mmlm.publish import asked_chat, asked_encoders
from mmlm.publish.asked_fields import read_asked
from mmlm.publish.asked_generation import read_generation
from mmlm.publish.asked_keys import ASKED, check_keys
from mmlm.publish.asked_media import all_bytes, listed, message_media, missing, require_pixels

MEDIA = {"image": "picture", "audio": "sound"}
NO_ADAPTER = "none"
"""The adapter to ask for where none is wanted: the base answers."""
CHUNK = 256
"""Questions whose media are held in memory at once."""


class Responder:
    """A checkpoint folder that answers people's questions. Safe to call from several threads."""

    def __init__(self, folder: Path | str, device: str | None = None) -> None:
        """`device`: such as `cuda`; absent: what MMLM_DEVICE names, else the CPU."""
        self.answerer = Answerer(folder, device=device or os.environ.get("MMLM_DEVICE", "cpu"))
        self.spec: FeatureSpec = self.answerer.spec
        self._encoder = Encoder(self.spec, self.answerer.tokenizer)
        self._lock, self._encoding = threading.Lock(), threading.Lock()
        self._encoders = asked_encoders.find(self.spec, asked_encoders.places())
        self.adapters = adapters.names(self.answerer.model)
        self._usual = adapters.active(self.answerer.model)

    @classmethod
    def load(cls, model: str | Path, *, tracking_uri: str | None = None, device: str | None = None) -> Responder:
        """`model` is `models:/NAME@champion`, `models:/NAME/1`, `runs:/…`, or a folder: a checkpoint, an MLflow
        model, or the output of `mmlm run`. Raises ArtifactError when there is none."""
        from mmlm.publish.locate import checkpoint_folder

        return cls(checkpoint_folder(str(model), tracking_uri), device)

    def answer(self, questions: Iterable[Mapping[str, Any]], *, paths: bool = True) -> list[dict[str, Any]]:
        """One answer or `{"error"}` per question, in order. With `paths` false a text where media belong is base64 or a
        `data:` URI and never opens a file."""
        rows = list(questions)
        return [a for i in range(0, len(rows), CHUNK) for a in self._answer(rows[i : i + CHUNK], paths)]

    def _answer(self, rows: list[Mapping[str, Any]], paths: bool) -> list[dict[str, Any]]:
        results: list[dict[str, Any]] = [{} for _ in rows]
        asked: dict[tuple[str | None, str], tuple[GenerationConfig, dict[int, Sample]]] = {}
        for i, row in enumerate(rows):
            try:
                name = self._adapter(row)
                sample, generation = self.sample(row, paths), read_generation(row.get("generation"), self.spec)
            except MmlmError as error:
                results[i] = {"error": str(error)}
            else:
                asked.setdefault((name, generation.model_dump_json()), (generation, {}))[1][i] = sample
        for (name, _), (generation, samples) in asked.items():
            try:
                with self._lock:
                    self._use(name)
                    answers = self.answerer.answer(list(samples.values()), generation=generation)
            except ConfigError as error:  # a schema that cannot be followed
                results = [{"error": str(error)} if i in samples else known for i, known in enumerate(results)]
                continue
            for i, answer in zip(samples, answers, strict=True):
                results[i] = _told(answer)
        return results

    def stream(self, question: Mapping[str, Any], *, paths: bool = True) -> Iterator[str | dict[str, Any]]:
        """Pieces of the answer as soon as they are certain, and in the end what `answer` gives, whose text they make up.

        Several may be on their way at once: each takes its turn token by token.
        """
        try:
            name = self._adapter(question)
            sample, generation = self.sample(question, paths), read_generation(question.get("generation"), self.spec)
            made = self.answerer.stream(sample, generation)
            while True:
                with self._lock:
                    self._use(name)
                    piece = next(made, None)
                if piece is None:
                    return
                yield piece if isinstance(piece, str) else _told(piece)
        except MmlmError as error:
            yield {"error": str(error)}

    def embed(self, rows: Iterable[Mapping[str, Any]], *, paths: bool = True) -> list[dict[str, Any]]:
        """`{"embedding": [numbers]}` or `{"error"}` for each row of text, image, audio and fields, in order: a vector of
        length 1 for all that the row gives; with `note` where a part of it is not read. Raises ConfigError when the model has
        no embedding head."""
        results: list[dict[str, Any]] = []
        samples: dict[int, Sample] = {}
        for i, row in enumerate(rows):
            results.append({})
            try:
                samples[i] = self._embedded(row, paths)
            except MmlmError as error:
                results[i] = {"error": str(error)}
            else:
                if not self.answerer.model.reads_text and not missing(row.get("text")):
                    results[i] = {"note": "the text is not read: this model reads none"}
        with self._lock:
            self._use(self._usual)
            found = embed(self.answerer, samples.values())
        for i, vector in zip(samples, found, strict=True):
            results[i] = {"embedding": [round(float(x), 6) for x in vector], **results[i]}
        return results

    def _embedded(self, row: Mapping[str, Any], paths: bool) -> Sample:
        """What of a row an embedding is made of. Raises DataError where that is nothing."""
        check_keys(row, ASKED)
        parts, text = self._media(row, paths), row.get("text")
        if not missing(text) and not self.answerer.model.reads_text and not parts:
            takes = [kind for kind in ASKED[1:] if kind in self.spec.modalities]
            raise DataError("there is only text, and this model reads none", wanted=" or ".join(takes))
        if not missing(text):
            parts.append(Part("text", role="context", text=str(text)))
        if not parts:
            raise DataError("there is nothing to embed", wanted=" or ".join(ASKED))
        return self.encode(Record("thing", tuple(parts), self.spec.tasks[0].name), _no_read)

    def _adapter(self, row: Mapping[str, Any]) -> str | None:
        """The adapter that a question asks for, None for the bare base. Raises DataError when there is no such one."""
        name = row.get("adapter")
        if missing(name):
            return self._usual
        if self.adapters and name == NO_ADAPTER:
            return None
        if name not in self.adapters:
            raise DataError(
                f"this model has no adapter {str(name)[:40]!r}",
                wanted=" or ".join([*self.adapters, NO_ADAPTER]) if self.adapters else "a question without adapter",
            )
        return str(name)

    def _use(self, name: str | None) -> None:
        if self.adapters:
            adapters.switch(self.answerer.model, name)

    def sample(self, row: Mapping[str, Any], paths: bool = True) -> Sample:
        """The question as features. Raises DataError with a sentence for the person who asked."""
        if asked_chat.is_chat(row):
            parts, said = asked_chat.read_messages(row, lambda kind, value: self._medium(kind, value, paths))
            require_pixels([part.data for part in parts if part.kind == "image" and part.data])
            parts = [
                replace(part, fields=read_asked(part.fields, self.spec.fields)) if part.kind == "fields" else part
                for part in parts
            ]
            return self.encode(Record("question", tuple(parts), task_of(row, said, self.spec).name), _no_read)
        check_keys(row)
        parts = self._media(row, paths)
        text = row.get("text")
        if missing(text) or not str(text).strip():
            if not parts:
                raise DataError("nothing is asked", wanted=" or ".join(ASKED))
            task = self.spec.tasks[0]
            text = task.questions[0] if task.questions else ""
        elif not isinstance(text, str):
            raise DataError(f"the text is a {type(text).__name__}", wanted="a string")
        else:
            task = route(text, self.spec)
        if text:
            parts.append(Part("text", text=text))
        return self.encode(Record("question", tuple(parts), task.name), _no_read)

    def _media(self, row: Mapping[str, Any], paths: bool) -> list[Part]:
        parts = []
        for kind, word in MEDIA.items():
            if missing(value := row.get(kind)) or not (several := listed(value)):
                continue
            self._require(kind)
            found = all_bytes(several, word, paths, self._most(kind))
            if kind == "image":
                require_pixels(found)
            parts += [Part(kind, data=data) for data in found]
        if not missing(fields := row.get("fields")):
            parts.append(Part("fields", fields=read_asked(fields, self.spec.fields)))
        return parts

    def _most(self, kind: str) -> int:
        """How many pictures or sounds a question has room for, at most."""
        pictures = self.spec.image if kind == "image" else None
        encoder = self.spec.encoder("image" if kind == "image" else "audio")
        each = encoder.tokens if encoder else pictures.tokens if pictures and pictures.padding != "drop" else 1
        return max(1, self.spec.max_len // each)

    def _medium(self, kind: str, value: Any, paths: bool) -> Part:
        """A picture or sound in a message."""
        self._require(kind)
        return Part(kind, data=message_media(value, MEDIA[kind], paths))

    def _require(self, kind: str) -> None:
        """Raises DataError where this model does not read pictures or sounds."""
        word = MEDIA.get(kind, kind)
        if kind not in MEDIA or getattr(self.spec, kind) is None:
            raise DataError(f"this model takes no {word}s", cure=f"ask without {kind}")
        if self.spec.encoder("image" if kind == "image" else "audio") and kind not in self._encoders:
            raise DataError(
                f"this model reads what a pretrained encoder makes of a {word}, and it is not known where that lies",
                cure=f"ask without {kind}, or start with --encoder {kind}=FOLDER (or {asked_encoders.PLACES})",
            )

    def encode(self, record: Record, read: Callable[[Part], bytes]) -> Sample:
        """A record as this model's features, without its answer. Raises SampleError."""
        sample = self._encoder.encode(record, read, with_answer=False)
        self.add_features(sample)
        return sample

    def add_features(self, sample: Sample) -> None:
        """What the pretrained encoders make of its pictures and sounds, where the model reads that."""
        if self._encoders:
            with self._encoding:
                asked_encoders.add_features(sample, self._encoders)


def _told(answer: Answer) -> dict[str, Any]:
    if answer.error is not None:
        return {"error": answer.error}
    scores = {label: round(share, 6) for label, share in answer.label_scores.items()}
    score = None if answer.score is None else round(answer.score, 6)
    told: dict[str, Any] = {"answer": answer.answer, "score": score, "label_scores": scores}
    if answer.labels is not None:
        told["labels"] = answer.labels
    if answer.number is not None:
        told["number"] = answer.number
    return told


def _no_read(part: Part) -> bytes:
    raise DataError(f"the {part.kind} was not read")


def task_of(row: Mapping[str, Any], said: str, spec: FeatureSpec) -> TaskSpec:
    """The task that a line names, else the one that its text is a question of. Raises DataError for a name that is none."""
    if missing(name := row.get("task")):
        return route(said, spec)
    found = next((task for task in spec.tasks if task.name == name), None)
    if found is None:
        raise DataError(f"no task {str(name)[:40]!r}", wanted=" or ".join(task.name for task in spec.tasks))
    return found


def route(question: str, spec: FeatureSpec) -> TaskSpec:
    """The task that a question belongs to: one that knows it word for word, else the one with the most similar known
    question (Dice coefficient of character bigrams and trigrams), else the first."""
    if len(spec.tasks) == 1:
        return spec.tasks[0]
    plain = _plain(question)
    for task in spec.tasks:
        if any(_plain(known) == plain for known in task.questions):
            return task
    grams = _grams(plain)
    best, most = spec.tasks[0], 0.0
    for task in spec.tasks:
        for known in task.questions:
            other = _grams(_plain(known))
            alike = 2 * sum((grams & other).values()) / max(sum(grams.values()) + sum(other.values()), 1)
            if alike > most:
                best, most = task, alike
    return best


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _grams(text: str) -> Counter[str]:
    padded = f" {text} "
    return Counter(padded[i : i + n] for n in (2, 3) for i in range(len(padded) - n + 1))
