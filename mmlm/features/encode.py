"""One record → one Sample: the same code when shards are made and when a served model is asked."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from mmlm.corpus.records import Part, Record, Target
from mmlm.features.audio import Span, decode_sound
from mmlm.features.borders import Border, border_of, picture_positions
from mmlm.features.chat import Chat, Said
from mmlm.features.failures import SampleError
from mmlm.features.fields import read_fields
from mmlm.features.image import decode_image
from mmlm.features.sample import Sample
from mmlm.features.spec import ANSWER, AUDIO, BOS, EOS, FIELDS, IMAGE, FeatureSpec
from mmlm.features.text import Tokenizer
from mmlm.features.video import decode_video
from mmlm.storage import split_fragment

Read = Callable[[Part], bytes]


@dataclass(slots=True)
class _Media:
    """What one part holds: a picture, a sound, or the frames and the sound of a video."""

    images: list[np.ndarray] = field(default_factory=list)
    sounds: list[np.ndarray] = field(default_factory=list)
    borders: list[Border] = field(default_factory=list)
    """Of each picture, where padding is left out."""
    cut: bool = False
    """Whether a sound was longer than the spec allows."""


class Encoder:
    """Turns records into samples for one FeatureSpec.

    `cache`: how many decoded pictures and sounds are kept, by URI, since one picture may belong to many records.
    `keep_long`: texts of the training split may be longer than `spec.max_len`, and elsewhere answers may.
    `cut_sounds` counts the sounds that were longer than the spec allows, `left_out` the pictures, sounds and videos that it
    has no room for.
    """

    def __init__(self, spec: FeatureSpec, tokenizer: Tokenizer, cache: int = 0, keep_long: bool = False) -> None:
        self.spec, self.tokenizer, self.keep_long = spec, tokenizer, keep_long
        self.cut_sounds = self.left_out = 0
        self._cache_size = cache
        self._cache: OrderedDict[tuple[str, str], _Media | SampleError] = OrderedDict()
        self._file = ("", b"")
        self._chat = Chat(spec.chat_template, tokenizer)

    def encode(self, record: Record, read: Read, with_answer: bool = True) -> Sample:
        """The sample of `record`; `read` gives the bytes of a part. Pictures and sounds that the spec has no room for
        are left out.

        `<bos>`, what `Chat.lay_out` makes of the record's texts and media slots, `<answer>`, and the answer and `<eos>`
        unless `with_answer` is false. A video gives a slot for each frame, then one for its sound. Raises SampleError with a
        typed reason.
        """
        sample = Sample(record.id, record.task, np.zeros(0, np.int32), 0)
        cut, left_out = 0, 0
        pieces: list[Said] = []
        for part in self._chat.in_order(record.parts):
            slots: list[int] = []
            if part.kind == "text":
                pieces.append(Said(part.role, part.text or "", turn=part.turn))
            elif self._has_room(part.kind):
                media = self._decoded(part, read)
                sample.images += media.images
                sample.sounds += media.sounds
                sample.borders += media.borders
                cut += media.cut
                slots = [IMAGE] * len(media.images) + [AUDIO] * len(media.sounds)
            elif part.kind == "fields" and self.spec.fields and part.fields:
                if sample.fields:
                    raise SampleError("unsupported", "two groups of fields in one record", wanted="one")
                sample.fields = read_fields(part.fields, self.spec.fields)
                slots = [FIELDS]
            elif part.kind == "video" and not self.spec.video:
                raise SampleError("unsupported", "a video", wanted="text, pictures, sounds or fields")
            elif part.kind != "fields":
                left_out += 1
            if slots:
                pieces.append(Said(part.role, slots=tuple(slots), turn=part.turn))
        if not any(said.slots or said.text or said.role == "context" for said in pieces):
            raise SampleError(
                "empty", "there is nothing to read: no text, picture, sound or field", wanted="one of them"
            )
        prompt = self._chat.lay_out(pieces)
        tokens = [BOS, *prompt.ids]
        sample.context_spans = [(first + 1, last + 1) for first, last in prompt.spans]
        sample.answer_at = len(tokens)
        tokens.append(ANSWER)
        if with_answer:
            tokens += [*self._answer(record.target, sample), EOS]
        sample.tokens = np.array(tokens, np.int32)
        self._check_length(sample, record.split)
        self.cut_sounds += cut
        self.left_out += left_out
        sample.lang, sample.split, sample.group, sample.source = record.lang, record.split, record.group, record.source
        sample.label, sample.number = record.target.label, record.target.number
        sample.labels = list(record.target.labels) if record.target.labels is not None else None
        return sample

    def _answer(self, target: Target, sample: Sample) -> list[int]:
        sample.answer = answer_text(target)
        if sample.answer is None:
            raise SampleError("no_answer", "the record has no label, number or text to answer", wanted="one of them")
        return self.tokenizer.encode(sample.answer)

    def _check_length(self, sample: Sample, split: str) -> None:
        length = opened_length(sample, self.spec)
        if self.keep_long and length == len(sample.tokens):  # text alone can be split; a question stays whole
            if split in ("", "train"):
                return
            length = sample.answer_at + 1
        if length > self.spec.max_len:
            raise SampleError(
                "too_long",
                f"a sequence of {length} tokens",
                wanted=f"at most {self.spec.max_len}",
                cure="raise max_len",
            )

    def _has_room(self, kind: str) -> bool:
        spec = self.spec
        rooms = {"image": spec.image, "audio": spec.audio, "video": spec.video and (spec.image or spec.audio)}
        return bool(rooms.get(kind))

    def _decoded(self, part: Part, read: Read) -> _Media:
        """What `part` holds; from the cache where the same URI was decoded before."""
        key = (part.kind, part.uri) if part.uri and self._cache_size else None
        if key and key in self._cache:
            self._cache.move_to_end(key)
            found = self._cache[key]
            if isinstance(found, SampleError):
                raise found
            return found
        result: _Media | SampleError
        try:
            span = split_fragment(part.uri)[1] if part.uri else None
            result = self._decode(part.kind, self._bytes(part, read, span), span)
            if self.spec.image and self.spec.image.padding == "drop":
                result.borders = [border_of(x, self.spec.image) for x in result.images]
        except SampleError as error:
            result = error
        if key:
            self._cache[key] = result
            if len(self._cache) > self._cache_size:
                self._cache.popitem(last=False)
        if isinstance(result, SampleError):
            raise result
        return result

    def _bytes(self, part: Part, read: Read, span: Span | None) -> bytes:
        """The bytes of a part. Those of a file that is taken in pieces are kept for the next piece."""
        if part.data is not None:
            return part.data
        if span is None or part.uri is None or not self._cache_size:
            return read(part)
        name = part.uri.rpartition("#t=")[0]
        if self._file[0] != name:
            self._file = ("", b"")  # the old ones may go before the new ones come
            self._file = (name, read(part))
        return self._file[1]

    def _decode(self, kind: str, data: bytes, span: Span | None) -> _Media:
        spec = self.spec
        if kind == "image" and spec.image:
            return _Media([decode_image(data, spec.image)])
        if kind == "audio" and spec.audio:
            sound, cut = decode_sound(data, spec.audio, span)
            return _Media([], [sound], cut=cut)
        assert kind == "video" and spec.video
        video = decode_video(data, spec.video, spec.image, spec.audio, span)
        return _Media(video.frames, [] if video.sound is None else [video.sound], cut=video.cut)


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
        length += picture_positions(sample, spec) - len(sample.images)
    if spec.audio:
        length += spec.audio_positions([len(sound) for sound in sample.sounds]) - len(sample.sounds)
    if spec.fields and sample.fields:
        length += len(spec.fields.names) - 1
    return length
