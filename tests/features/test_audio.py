from __future__ import annotations

import io
import math
import struct

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from mmlm.features import audio
from mmlm.features.audio import _mel_power, _windows, decode_audio, decode_sound, log_mel
from mmlm.features.failures import SampleError
from mmlm.features.spec import AudioSpec

SPEC = AudioSpec(n_mels=80, max_seconds=0.8)


def tone(seconds: float, rate: int, hertz: float = 440.0, level: float = 0.5) -> np.ndarray:
    return level * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def wav(samples: np.ndarray, rate: int = 16000, **settings: str) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, samples, rate, format=settings.pop("format", "WAV"), **settings)
    return out.getvalue()


def reference_log_mel(wave: np.ndarray, spec: AudioSpec) -> np.ndarray:
    """The same by plain loops in double precision: a DFT by its sum, filters by interpolation between their corners."""

    def to_mel(f: float) -> float:
        return 3 * f / 200 if f < 1000 else 15 + 27 * math.log(f / 1000) / math.log(6.4)

    def to_hertz(m: float) -> float:
        return 200 * m / 3 if m < 15 else 1000 * 6.4 ** ((m - 15) / 27)

    n, top = spec.n_fft, to_mel(spec.sample_rate / 2)
    corners = [to_hertz(top * i / (spec.n_mels + 1)) for i in range(spec.n_mels + 2)]
    bins = np.arange(n // 2 + 1)
    dft = np.exp(-2j * np.pi * np.outer(bins, np.arange(n)) / n)
    hann = np.array([math.sin(math.pi * i / n) ** 2 for i in range(n)])
    rows = []
    for start in range(0, len(wave) - n + 1, spec.hop):
        power = np.abs(dft @ (hann * wave[start : start + n])) ** 2
        hertz = bins * spec.sample_rate / n
        row = []
        for low, middle, high in zip(corners, corners[1:], corners[2:], strict=False):
            row.append(float(power @ np.interp(hertz, [low, middle, high], [0, 1, 0])) * 2 / (high - low))
        rows.append(row)
    mel = np.array(rows)
    with np.errstate(divide="ignore"):
        return np.maximum(np.log10(mel) - np.log10(mel.max()), spec.floor)


def test_log_mel_equals_an_independent_computation() -> None:
    rng = np.random.default_rng(0)
    wave = (tone(0.2, 16000) + rng.normal(0, 0.01, 3200)).astype(np.float32)
    ours, wanted = log_mel(wave, SPEC), reference_log_mel(wave.astype(np.float64), SPEC)
    assert ours.dtype == np.float16
    assert ours.shape == wanted.shape == (1 + (3200 - 400) // 160, 80)
    np.testing.assert_allclose(ours, wanted, atol=2e-3)  # the rounding to float16 of values up to 6


def test_the_loudest_value_is_zero_and_the_level_does_not_matter() -> None:
    rng = np.random.default_rng(1)
    wave = rng.normal(0, 0.1, 8000).astype(np.float32)
    mel = log_mel(wave, SPEC)
    assert mel.max() == 0
    assert mel.min() >= SPEC.floor
    np.testing.assert_array_equal(mel, log_mel(wave * np.float32(2**-6), SPEC))


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000])
def test_a_tone_is_found_at_its_pitch_whatever_the_sample_rate(rate: int) -> None:
    mel = decode_audio(wav(tone(0.5, rate, 1000.0), rate), SPEC).astype(np.float32)
    at_16k = decode_audio(wav(tone(0.5, 16000, 1000.0), 16000), SPEC).astype(np.float32)
    assert abs(len(mel) - len(at_16k)) <= 1
    assert mel.mean(0).argmax() == at_16k.mean(0).argmax()


@pytest.mark.parametrize(
    ("form", "subtype"),
    [("WAV", "PCM_16"), ("WAV", "FLOAT"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("MP3", None), ("AIFF", "PCM_24")],
)
def test_all_formats_are_read(form: str, subtype: str | None) -> None:
    settings = {"subtype": subtype} if subtype else {}
    mel = decode_audio(wav(tone(0.5, 16000, 1000.0), 16000, format=form, **settings), SPEC).astype(np.float32)
    plain = decode_audio(wav(tone(0.5, 16000, 1000.0)), SPEC).astype(np.float32)
    assert mel.mean(0).argmax() == plain.mean(0).argmax()


def test_channels_are_mixed() -> None:
    left, right = tone(0.3, 16000, 500.0), tone(0.3, 16000, 2000.0)
    stereo = decode_audio(wav(np.stack([left, right], 1), subtype="FLOAT"), SPEC)
    mono = decode_audio(wav((left + right) / 2, subtype="FLOAT"), SPEC)
    np.testing.assert_allclose(stereo, mono, atol=5e-3)


def test_short_sounds_fill_one_window_and_long_ones_are_cut() -> None:
    click, was_cut = decode_sound(wav(tone(0.004, 16000)), SPEC)
    assert click.shape == (1, 80)
    assert not was_cut
    long, was_cut = decode_sound(wav(tone(2.0, 44100), 44100), SPEC)
    assert was_cut
    assert len(long) == 1 + (int(0.8 * 16000) - 400) // 160
    assert len(long) <= SPEC.max_frames
    assert not decode_sound(wav(tone(0.8, 8000), 8000), SPEC)[1]


def test_silence_is_the_floor() -> None:
    np.testing.assert_array_equal(decode_audio(wav(np.zeros(1600)), SPEC), np.float16(SPEC.floor))


def reason(data: bytes) -> str:
    with pytest.raises(SampleError) as caught:
        decode_audio(data, SPEC)
    return caught.value.reason


def test_failures_are_typed() -> None:
    good = wav(tone(0.3, 16000))
    assert reason(wav(np.zeros(0))) == "empty_sound"
    assert reason(b"") == "unreadable_audio"
    assert reason(b"RIFF rubbish") == "unreadable_audio"
    assert reason(good[:20]) == "unreadable_audio"
    assert reason(wav(np.array([0.1, np.nan, 0.2] * 500), subtype="FLOAT")) == "unreadable_audio"
    assert reason(wav(tone(0.3, 16000), format="AU")) == "unsupported"
    fast = bytearray(good)
    fast[24:28] = struct.pack("<I", 2_000_000_000)
    assert reason(bytes(fast)) == "bomb"


def test_a_header_that_announces_too_much_costs_nothing() -> None:
    data = bytearray(wav(tone(0.1, 16000)))
    at = data.index(b"data") + 4
    data[at : at + 4] = struct.pack("<I", 0xFFFFFF00)
    data[4:8] = struct.pack("<I", 0xFFFFFF00)
    mel = decode_audio(bytes(data), SPEC)
    assert len(mel) <= SPEC.max_frames


def test_a_sound_of_too_many_samples_says_how_long_it_may_be() -> None:
    out, second = io.BytesIO(), np.zeros((96_000, 8), np.int16)
    with soundfile.SoundFile(out, "w", 96_000, 8, format="FLAC", subtype="PCM_16") as file:
        for _ in range(90):
            file.write(second)
    long = AudioSpec(n_mels=80, max_seconds=600)
    with pytest.raises(
        SampleError, match=r"90 s of a sound with 8 channels at 96000 Hz; wanted .* 83 s; lower"
    ) as caught:
        decode_audio(out.getvalue(), long)
    assert caught.value.reason == "bomb"
    assert len(decode_audio(out.getvalue(), SPEC)) <= SPEC.max_frames


WHISPER = AudioSpec(scale="whisper", dtype="float32", max_seconds=2.0)


def reference_whisper(wave: np.ndarray, n_mels: int) -> np.ndarray:
    """Whisper's log-mel from its formulas in double precision: DFT by its sum, mirrored ends, last frame dropped."""

    def to_mel(f: float) -> float:
        return 3 * f / 200 if f < 1000 else 15 + 27 * math.log(f / 1000) / math.log(6.4)

    def to_hertz(m: float) -> float:
        return 200 * m / 3 if m < 15 else 1000 * 6.4 ** ((m - 15) / 27)

    wave = np.concatenate([wave[200:0:-1], wave, wave[-2:-202:-1]]).astype(np.float64)
    hann = np.array([math.sin(math.pi * i / 400) ** 2 for i in range(400)])
    dft = np.exp(-2j * np.pi * np.outer(np.arange(201), np.arange(400)) / 400)
    power = [np.abs(dft @ (hann * wave[at : at + 400])) ** 2 for at in range(0, len(wave) - 399, 160)][:-1]
    corners = [to_hertz(to_mel(8000) * i / (n_mels + 1)) for i in range(n_mels + 2)]
    bank = [
        np.interp(np.arange(201) * 40.0, [low, middle, high], [0, 1, 0]) * 2 / (high - low)
        for low, middle, high in zip(corners, corners[1:], corners[2:], strict=False)
    ]
    mel = np.log10(np.maximum(np.array(power) @ np.array(bank).T, 1e-10))
    return (np.maximum(mel, mel.max() - 8) + 4) / 4


@pytest.mark.parametrize("n_mels", [80, 128])
@pytest.mark.parametrize("samples", [400, 16000, 16111])
def test_whisper_scale_equals_its_formulas(n_mels: int, samples: int) -> None:
    """1e-4 holds for float32 as it is stored; float16 adds its own rounding, 5e-4."""
    rng = np.random.default_rng(3)
    wave = (tone(2.0, 16000, 3000.0, 0.3)[:samples] + rng.normal(0, 0.003, samples)).astype(np.float32)
    wanted = reference_whisper(wave, n_mels)
    spec = WHISPER.model_copy(update={"n_mels": n_mels})
    ours = log_mel(wave, spec)
    assert (ours.dtype, ours.shape) == (np.float32, (samples // 160, n_mels))
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-4)
    halves = log_mel(wave, spec.model_copy(update={"dtype": "float16"}))
    assert halves.dtype == np.float16
    np.testing.assert_allclose(halves, wanted, rtol=0, atol=6e-4)


@st.composite
def waves(draw: st.DrawFn) -> np.ndarray:
    """Tones, noise, clicks, a constant and the Nyquist frequency, loud and faint, beside silence or faint noise."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    samples, at = draw(st.integers(400, 1500)), np.arange(1500)
    kind = draw(st.sampled_from(["tone", "noise", "constant", "nyquist", "clicks", "silence"]))
    made = {
        "tone": np.sin(2 * np.pi * draw(st.floats(20, 7980)) * at / 16000), "noise": rng.standard_normal(1500),
        "constant": np.ones(1500), "nyquist": (-1.0) ** at, "clicks": (rng.random(1500) < 0.002) * 1.0,
        "silence": np.zeros(1500),
    }[kind]  # fmt: skip
    wave = made * 10 ** draw(st.floats(-6, 0))
    wave[draw(st.integers(0, 1500)) :] *= draw(st.sampled_from([0, 1e-6, 1e-3, 1]))
    wave += rng.standard_normal(1500) * draw(st.sampled_from([0, 1e-7, 1e-5, 1e-3]))
    return wave[:samples].astype(np.float32)


def test_frames_that_single_precision_cannot_tell_are_computed_in_double() -> None:
    """A loud tone at the Nyquist frequency beside faint noise; every other frame of the sound is plain."""
    at, rng = np.arange(16000), np.random.default_rng(0)
    wave = rng.standard_normal(16000) * 0.01
    wave[8000:12000] = (-1.0) ** at[:4000] + rng.standard_normal(4000) * 2e-4
    wave = wave.astype(np.float32)
    wanted = reference_whisper(wave, 80)
    np.testing.assert_allclose(log_mel(wave, WHISPER), wanted, rtol=0, atol=1e-4)
    padded = np.concatenate([wave[200:0:-1], wave, wave[-2:-202:-1]]).astype(np.float32)
    single = np.log10(np.maximum(_mel_power(_windows(padded, WHISPER), WHISPER)[:, :-1], 1e-10))
    single = (np.maximum(single, single.max() - 8).T + 4) / 4
    assert np.abs(single - wanted).max() > 1e-4


@settings(max_examples=30, deadline=None, derandomize=True)
@given(waves(), st.sampled_from([80, 128]))
def test_both_scales_hold_whatever_the_level(wave: np.ndarray, n_mels: int) -> None:
    """Whisper's within 1e-4 of double precision (6e-5, over 3,000 such sounds); the relative one within 1e-3."""
    spec = WHISPER.model_copy(update={"n_mels": n_mels})
    np.testing.assert_allclose(log_mel(wave, spec), reference_whisper(wave, n_mels), rtol=0, atol=1e-4)
    relative = SPEC.model_copy(update={"n_mels": n_mels, "dtype": "float32"})
    ours = log_mel(wave, relative)
    if not wave.any():
        assert (ours == SPEC.floor).all()
        return
    np.testing.assert_allclose(ours, reference_log_mel(wave.astype(np.float64), relative), rtol=0, atol=1e-3)


def test_a_sound_too_faint_for_single_precision_keeps_its_shape() -> None:
    wave = np.random.default_rng(8).normal(0, 0.1, 8000).astype(np.float32)
    np.testing.assert_array_equal(log_mel(wave, SPEC), log_mel(wave * np.float32(2**-70), SPEC))


def test_whisper_scale_of_silence_and_of_next_to_nothing() -> None:
    assert set(log_mel(np.zeros(8000, np.float32), WHISPER).ravel()) == {WHISPER.silence} == {-1.5}
    click = decode_audio(wav(tone(0.004, 16000)), WHISPER)
    assert click.shape == (2, 80)
    long, cut = decode_sound(wav(tone(3.0, 16000)), WHISPER)
    assert (len(long), cut) == (WHISPER.max_frames, True)


def test_stored_values_come_to_about_one() -> None:
    for spec in (SPEC, WHISPER):
        mel = decode_audio(wav(tone(0.5, 16000)), spec).astype(np.float64)
        factor, offset = spec.to_unit
        assert -1.51 <= (mel * factor + offset).min() <= (mel * factor + offset).max() <= 1.5


@pytest.mark.parametrize("form", ["WAV", "FLAC", "OGG", "MP3"])
def test_a_span_is_what_cutting_the_decoded_sound_gives(form: str) -> None:
    rng = np.random.default_rng(4)
    wave = np.concatenate([tone(1.0, 16000, hertz) for hertz in (300, 700, 1500, 3000)])
    data = wav(wave + rng.normal(0, 0.01, len(wave)), format=form)
    with soundfile.SoundFile(io.BytesIO(data)) as sound:
        whole = sound.read(dtype="float32")
    found, cut = decode_sound(data, SPEC, (2.25, 2.75))
    assert not cut
    wanted = log_mel(whole[36000:44000], SPEC)
    np.testing.assert_allclose(found, wanted, atol=0 if form in ("WAV", "FLAC") else 0.02)


def test_a_span_reads_no_more_than_itself() -> None:
    class Counted(io.BytesIO):
        read_bytes = 0

        def readinto(self, buffer):  # type: ignore[no-untyped-def]
            count = super().readinto(buffer)
            Counted.read_bytes += count
            return count

    data = wav(tone(60.0, 16000))
    real, audio.io.BytesIO = io.BytesIO, Counted  # type: ignore[misc]
    try:
        decode_sound(data, SPEC, (50.0, 50.5))
    finally:
        audio.io.BytesIO = real  # type: ignore[misc]
    assert 16000 <= Counted.read_bytes < 60_000 < len(data)


def test_spans_that_hold_nothing_and_ends_behind_the_end() -> None:
    data = wav(tone(1.0, 16000))
    for span in ((2.0, 3.0), (0.5, 0.5), (0.7, 0.2)):
        with pytest.raises(SampleError) as caught:
            decode_sound(data, SPEC, span)
        assert caught.value.reason == "empty_sound"
    mel, cut = decode_sound(data, SPEC, (0.5, 9.0))
    assert (len(mel), cut) == (1 + (8000 - 400) // 160, False)


def test_silence_at_both_ends_is_trimmed() -> None:
    trimmed = SPEC.model_copy(update={"trim_db": 40.0})
    quiet = np.random.default_rng(5).normal(0, 1e-5, 16000)
    loud = tone(0.5, 16000)
    mel, cut = decode_sound(wav(np.concatenate([quiet, loud, quiet]), subtype="FLOAT"), trimmed)
    assert not cut  # 2.5 s long, of which 0.6 are kept
    assert len(mel) == 1 + (9600 - 400) // 160  # with 50 ms on either side
    plain = decode_audio(wav(loud, subtype="FLOAT"), trimmed)
    np.testing.assert_allclose(mel[5:-5], plain, atol=0.01)
    assert len(decode_audio(wav(np.zeros(4000)), trimmed)) == len(decode_audio(wav(np.zeros(4000)), SPEC))
    assert decode_sound(wav(np.concatenate([quiet, tone(2.0, 16000)]), subtype="FLOAT"), trimmed)[1]


def test_long_sounds_may_be_refused() -> None:
    strict = SPEC.model_copy(update={"on_long": "refuse"})
    assert decode_sound(wav(tone(0.8, 16000)), strict)[1] is False
    with pytest.raises(SampleError) as caught:
        decode_sound(wav(tone(0.9, 16000)), strict)
    assert caught.value.reason == "too_long"
