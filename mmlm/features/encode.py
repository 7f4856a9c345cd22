"""One record → one Sample: the same code when shards are made and when a served model is asked."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable

import numpy as np

from mmlm.corpus.records import Part, Record, Target
from mmlm.features.audio import decode_sound
from mmlm.features.failures import SampleError
from mmlm.features.fields import read_fields
from mmlm.features.image import decode_image
from mmlm.features.sample import Sample
from mmlm.features.spec import ANSWER, AUDIO, BOS, CONTEXT, EOS, FIELDS, IMAGE, FeatureSpec
from mmlm.features.text import Tokenizer

Read = Callable[[Part], bytes]


class Encoder:
    """Turns records into samples for one FeatureSpec.

    `cache`: how many decoded pictures and sounds are kept, by URI, since one picture may belong to many records.
    `cut_sounds` counts the sounds that were longer than the spec allows.
    """

    def __init__(self, spec: FeatureSpec, tokenizer: Tokenizer, cache: int = 0) -> None:
        self.spec, self.tokenizer = spec, tokenizer
        self.cut_sounds = 0
        self._cache_size = cache
        self._cache: OrderedDict[tuple[str, str], tuple[np.ndarray, bool] | SampleError] = OrderedDict()

    def encode(self, record: Record, read: Read, with_answer: bool = True) -> Sample:
        """The sample of `record`; `read` gives the bytes of a part. Pictures and sounds that the spec has no room for
        are left out.

        `<bos>`, media slots and context in the record's order, question, `<answer>`, and the answer and `<eos>` unless
        `with_answer` is false. Raises SampleError with a typed reason.
        """
        sample = Sample(record.id, record.task, np.zeros(0, np.int32), 0)
        tokens, questions, cut = [BOS], [], 0
        for part in record.parts:
            if part.kind == "text":
                if part.role == "context":
                    start = len(tokens)
                    tokens += [CONTEXT, *self.tokenizer.encode(part.text or "")]
                    sample.context_spans.append((start, len(tokens)))
                else:
                    questions.append(part.text or "")
            elif part.kind == "image" and self.spec.image:
                sample.images.append(self._decoded(part, read)[0])
                tokens.append(IMAGE)
            elif part.kind == "audio" and self.spec.audio:
                sound, was_cut = self._decoded(part, read)
                sample.sounds.append(sound)
                cut += was_cut
                tokens.append(AUDIO)
            elif part.kind == "fields" and self.spec.fields and part.fields:
                if sample.fields:
                    raise SampleError("unsupported", "two groups of fields in one record", wanted="one")
                sample.fields = read_fields(part.fields, self.spec.fields)
                tokens.append(FIELDS)
            elif part.kind == "video":
                raise SampleError("unsupported", "a video", wanted="text, pictures, sounds or fields")
        tokens += self.tokenizer.encode("\n".join(questions))
        if len(tokens) == 1:
            raise SampleError(
                "empty", "there is nothing to read: no text, picture, sound or field", wanted="one of them"
            )
        sample.answer_at = len(tokens)
        tokens.append(ANSWER)
        if with_answer:
            tokens += [*self._answer(record.target, sample), EOS]
        sample.tokens = np.array(tokens, np.int32)
        self._check_length(sample)
        self.cut_sounds += cut
        sample.lang, sample.split, sample.group = record.lang, record.split, record.group
        sample.label, sample.number = record.target.label, record.target.number
        sample.labels = list(record.target.labels) if record.target.labels is not None else None
        return sample

    def _answer(self, target: Target, sample: Sample) -> list[int]:
        sample.answer = answer_text(target)
        if sample.answer is None:
            raise SampleError("no_answer", "the record has no label, number or text to answer", wanted="one of them")
        return self.tokenizer.encode(sample.answer)

    def _check_length(self, sample: Sample) -> None:
        length = opened_length(sample, self.spec)
        if length > self.spec.max_len:
            raise SampleError(
                "too_long",
                f"a sequence of {length} tokens",
                wanted=f"at most {self.spec.max_len}",
                cure="raise max_len",
            )

    def _decoded(self, part: Part, read: Read) -> tuple[np.ndarray, bool]:
        """Picture or sound, and whether it was cut; from the cache where the same URI was decoded before."""
        key = (part.kind, part.uri) if part.uri and self._cache_size else None
        if key and key in self._cache:
            self._cache.move_to_end(key)
            found = self._cache[key]
            if isinstance(found, SampleError):
                raise found
            return found
        result: tuple[np.ndarray, bool] | SampleError
        try:
            data = part.data if part.data is not None else read(part)
            result = self._decode(part.kind, data)
        except SampleError as error:
            result = error
        if key:
            self._cache[key] = result
            if len(self._cache) > self._cache_size:
                self._cache.popitem(last=False)
        if isinstance(result, SampleError):
            raise result
        return result

    def _decode(self, kind: str, data: bytes) -> tuple[np.ndarray, bool]:
        if kind == "image":
            assert self.spec.image
            return decode_image(data, self.spec.image), False
        assert self.spec.audio
        return decode_sound(data, self.spec.audio)


def answer_text(target: Target) -> str | None:
    """What is to be answered, as text: the target's own text, else its label, labels or number."""
    if target.text is not None:
        return target.text
    if target.label is not None:
        return target.label
    if target.labels is not None:
        return ", ".join(target.labels)
    return None if target.number is None else format(target.number, ".6g")


def opened_length(sample: Sample, spec: FeatureSpec) -> int:
    """Positions of the sample's sequence once each media slot is opened to what it holds."""
    length = len(sample.tokens)
    if spec.image:
        length += len(sample.images) * (spec.image.tokens - 1)
    if spec.audio:
        length += sum(math.ceil(len(sound) / spec.audio.frames_per_token) - 1 for sound in sample.sounds)
    if spec.fields and sample.fields:
        length += len(spec.fields.names) - 1
    return length
