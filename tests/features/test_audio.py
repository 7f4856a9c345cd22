from __future__ import annotations

import io
import math
import struct

import numpy as np
import pytest
import soundfile

from mmlm.features.audio import decode_audio, decode_sound, log_mel
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
    ("form", "subtype"), [("WAV", "PCM_16"), ("WAV", "FLOAT"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("MP3", None)]
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
    assert reason(wav(tone(0.3, 16000), format="AIFF")) == "unsupported"
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
