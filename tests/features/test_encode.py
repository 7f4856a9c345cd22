from __future__ import annotations

import io

import numpy as np
import pytest
import soundfile
from PIL import Image

from mmlm.corpus.records import Part, Record, Target
from mmlm.features.config import TokenizerConfig
from mmlm.features.encode import Encoder, opened_length
from mmlm.features.failures import SampleError
from mmlm.features.spec import (
    ANSWER,
    AUDIO,
    BOS,
    CONTEXT,
    EOS,
    FIELDS,
    IMAGE,
    AudioSpec,
    FeatureSpec,
    FieldsSpec,
    ImageSpec,
    TaskSpec,
)  # fmt: skip
from mmlm.features.text import Tokenizer, train_tokenizer


def png() -> bytes:
    out = io.BytesIO()
    Image.new("L", (16, 16), 7).save(out, "PNG")
    return out.getvalue()


def wav() -> bytes:
    out = io.BytesIO()
    soundfile.write(out, 0.5 * np.sin(np.arange(4000) / 5), 16000, format="WAV")
    return out.getvalue()


MEDIA = {"a.png": png(), "a.wav": wav(), "bad.png": b"no picture"}
QUESTION, CAPTION = Part("text", text="What is it? <image>"), Part("text", "context", text="A frog.")
PICTURE, SOUND = Part("image", uri="a.png"), Part("audio", uri="a.wav")
FIELD = Part("fields", fields={"age": 3.0, "colour": "red", "other": "x"})


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["What is it?", "frog"], TokenizerConfig(vocab_size=300))


def make_spec(tokenizer: Tokenizer, **changes: object) -> FeatureSpec:
    values: dict = {
        "vocab_size": tokenizer.vocab_size, "tokenizer_digest": tokenizer.digest, "max_len": 96,
        "image": ImageSpec(size=16, patch=8, channels=1), "audio": AudioSpec(n_mels=20, max_seconds=0.5),
        "fields": FieldsSpec(numbers={"age": (0.0, 1.0), "size": (0.0, 1.0)}, categories={"colour": ["blue", "red"]}),
        "tasks": [TaskSpec(name="answer")],
    }  # fmt: skip
    return FeatureSpec(**{**values, **changes})


def read(part: Part) -> bytes:
    assert part.uri
    return MEDIA[part.uri]


def record(*parts: Part, **target: object) -> Record:
    return Record("r", parts, target=Target(**(target or {"label": "frog"})), lang="en", split="train", group="g")  # type: ignore[arg-type]


def test_the_sequence_is_what_was_agreed(tokenizer: Tokenizer) -> None:
    encoder = Encoder(make_spec(tokenizer), tokenizer)
    sample = encoder.encode(record(QUESTION, PICTURE, CAPTION, SOUND, FIELD, label="frog"), read)
    context, question, answer = (tokenizer.encode(t) for t in ("A frog.", "What is it? <image>", "frog"))
    wanted = [BOS, IMAGE, CONTEXT, *context, AUDIO, FIELDS, *question, ANSWER, *answer, EOS]
    assert sample.tokens.tolist() == wanted
    assert sample.tokens.dtype == np.int32
    assert sample.tokens[sample.answer_at] == ANSWER
    assert sample.context_spans == [(2, 3 + len(context))]
    assert (sample.images[0].shape, sample.sounds[0].shape) == ((16, 16, 1), (23, 20))
    assert sample.fields == {"age": 3.0, "size": None, "colour": "red"}
    assert (sample.label, sample.answer, sample.lang, sample.split, sample.group) == (
        "frog",
        "frog",
        "en",
        "train",
        "g",
    )
    assert sample.modalities == ("audio", "context", "fields", "image")


def test_a_question_ends_with_the_answer_mark(tokenizer: Tokenizer) -> None:
    encoder = Encoder(make_spec(tokenizer), tokenizer)
    asked = encoder.encode(record(QUESTION, PICTURE), read, with_answer=False)
    whole = encoder.encode(record(QUESTION, PICTURE), read)
    assert asked.tokens.tolist() == whole.tokens[: whole.answer_at + 1].tolist()
    assert asked.answer is None


@pytest.mark.parametrize(
    ("target", "answer"),
    [
        ({"text": "A frog", "label": "animal"}, "A frog"),
        ({"labels": ("a", "b")}, "a, b"),
        ({"number": 3.0}, "3"),
        ({"number": 0.25}, "0.25"),
    ],
)
def test_what_is_answered(tokenizer: Tokenizer, target: dict, answer: str) -> None:
    sample = Encoder(make_spec(tokenizer), tokenizer).encode(record(QUESTION, **target), read)
    assert sample.answer == answer
    assert tokenizer.decode(sample.tokens[sample.answer_at :]) == answer


def test_modalities_without_room_are_left_out(tokenizer: Tokenizer) -> None:
    spec = make_spec(tokenizer, image=None, audio=None, fields=None)
    sample = Encoder(spec, tokenizer).encode(record(PICTURE, SOUND, FIELD, QUESTION), read)
    assert sample.modalities == ()
    assert sample.tokens[1] not in (IMAGE, AUDIO, FIELDS)


def test_length_counts_opened_slots(tokenizer: Tokenizer) -> None:
    spec = make_spec(tokenizer)
    sample = Encoder(spec, tokenizer).encode(record(PICTURE, SOUND, FIELD, QUESTION), read)
    length = opened_length(sample, spec)
    assert length == len(sample.tokens) - 3 + 4 + 3 + 3  # 4 patches, ceil(23 / 8) mel tokens, 3 fields
    Encoder(make_spec(tokenizer, max_len=length), tokenizer).encode(record(PICTURE, SOUND, FIELD, QUESTION), read)
    with pytest.raises(SampleError) as caught:
        Encoder(make_spec(tokenizer, max_len=length - 1), tokenizer).encode(
            record(PICTURE, SOUND, FIELD, QUESTION), read
        )
    assert caught.value.reason == "too_long"


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (record(), "empty"),
        (record(QUESTION, Part("image", uri="bad.png")), "unreadable_image"),
        (record(QUESTION, Part("video", uri="a.mp4")), "unsupported"),
        (record(QUESTION, FIELD, FIELD), "unsupported"),
        (Record("r", (QUESTION,)), "no_answer"),
    ],
)
def test_failures_are_typed(tokenizer: Tokenizer, given: Record, reason: str) -> None:
    with pytest.raises(SampleError) as caught:
        Encoder(make_spec(tokenizer), tokenizer).encode(given, read)
    assert caught.value.reason == reason


def test_shared_media_are_decoded_once_and_fail_alike(tokenizer: Tokenizer) -> None:
    seen: list[str | None] = []

    def counted(part: Part) -> bytes:
        seen.append(part.uri)
        return read(part)

    encoder = Encoder(make_spec(tokenizer), tokenizer, cache=2)
    bad = Part("image", uri="bad.png")
    first, second = (encoder.encode(record(PICTURE, SOUND, QUESTION), counted) for _ in range(2))
    np.testing.assert_array_equal(first.images[0], second.images[0])
    for _ in range(2):
        with pytest.raises(SampleError, match="no picture"):
            encoder.encode(record(bad), counted)
    assert seen == ["a.png", "a.wav", "bad.png"]
    encoder.encode(record(PICTURE, QUESTION), counted)  # the oldest had to leave
    assert seen[3:] == ["a.png"]


def test_cut_sounds_are_counted(tokenizer: Tokenizer) -> None:
    encoder = Encoder(make_spec(tokenizer, audio=AudioSpec(n_mels=20, max_seconds=0.1)), tokenizer)
    encoder.encode(record(SOUND, QUESTION), read)
    assert encoder.cut_sounds == 1


def test_what_the_spec_has_no_room_for_is_counted(tokenizer: Tokenizer) -> None:
    encoder = Encoder(make_spec(tokenizer, audio=None), tokenizer)
    assert encoder.encode(record(PICTURE, SOUND, QUESTION), read).sounds == []
    assert encoder.left_out == 1


def test_bad_values_of_fields_are_missing(tokenizer: Tokenizer) -> None:
    encoder = Encoder(make_spec(tokenizer), tokenizer)
    part = Part("fields", fields={"age": "unknown", "size": float("inf"), "colour": 3.0})
    assert encoder.encode(record(part), read).fields == {"age": None, "size": None, "colour": None}
    assert encoder.encode(record(Part("fields", fields={"age": "39"})), read).fields["age"] == 39.0


def test_a_span_of_a_sound_is_decoded_and_its_file_read_once(tokenizer: Tokenizer) -> None:
    seen: list[str | None] = []

    def counted(part: Part) -> bytes:
        seen.append(part.uri)
        return MEDIA["a.wav"]

    encoder = Encoder(make_spec(tokenizer), tokenizer, cache=2)
    pieces = [f"a.wav#t={start},{start + 0.0625}" for start in (0.0, 0.0625, 0.125)]
    lengths = [len(encoder.encode(record(Part("audio", uri=uri), QUESTION), counted).sounds[0]) for uri in pieces]
    assert lengths == [1 + (1000 - 400) // 160] * 3
    assert seen == pieces[:1]
    with pytest.raises(SampleError, match="nothing between"):
        encoder.encode(record(Part("audio", uri="a.wav#t=5,6"), QUESTION), counted)
    whole = encoder.encode(record(SOUND, QUESTION), counted).sounds[0]
    assert len(whole) == 1 + (4000 - 400) // 160


def test_turns_by_a_template(tokenizer: Tokenizer) -> None:
    system = Part("text", "system", text="Be short.")
    plain = Encoder(make_spec(tokenizer), tokenizer).encode(record(system, QUESTION), read)
    assert tokenizer.decode(plain.tokens[1 : plain.answer_at]) == "Be short.\nWhat is it? <image>"
    chatml = Encoder(make_spec(tokenizer, chat_template="chatml", max_len=256), tokenizer).encode(
        record(QUESTION, CAPTION, system), read
    )
    laid_out = tokenizer.decode(chatml.tokens[chatml.context_spans[0][1] : chatml.answer_at])
    assert laid_out == (
        "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nWhat is it? <image><|im_end|>\n<|im_start|>assistant\n"
    )
    with pytest.raises(SampleError) as caught:
        Encoder(make_spec(tokenizer, chat_template="chatml", max_len=256), tokenizer).encode(record(), read)
    assert caught.value.reason == "empty"
