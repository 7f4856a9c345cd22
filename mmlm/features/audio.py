"""Sound → log-mel: WAV, FLAC, OGG and MP3 become (frames, mels) float16.

One channel, resampled; power spectrum of Hann windows; triangular filters of unit area, evenly spaced on Slaney's
mel scale (M. Slaney, Auditory Toolbox, Interval Research TR 1998-010: linear below 1 kHz, logarithmic above); log10
relative to the loudest value of the sound, floored. So the result does not depend on the level. No matrix product is
used: its last bits would depend on the number of threads, and shards are byte-reproducible.
"""

from __future__ import annotations

import functools
import io
import math

import numpy as np
import soundfile
import soxr

from mmlm.features.failures import SampleError
from mmlm.features.spec import AudioSpec

FORMATS = ("WAV", "WAVEX", "RF64", "FLAC", "OGG", "MP3")
MAX_SAMPLES = 64_000_000
"""Values decoded from one file at most (frames × channels)."""
MIN_RATE, MAX_RATE = 1_000, 384_000
"""Sample rates that are taken, Hz."""


def decode_audio(data: bytes, spec: AudioSpec) -> np.ndarray:
    """The sound as (frames, n_mels) float16 in [spec.floor, 0]; what is longer than `max_seconds` is cut.

    Raises SampleError: `unreadable_audio`, `empty_sound`, `bomb`, `unsupported`.
    """
    return decode_sound(data, spec)[0]


def decode_sound(data: bytes, spec: AudioSpec) -> tuple[np.ndarray, bool]:
    """As `decode_audio`, and whether the sound was cut at `max_seconds`."""
    wave, rate, cut = _read(data, spec)
    if rate != spec.sample_rate:
        wave = soxr.resample(wave, rate, spec.sample_rate, quality="HQ")
    return log_mel(wave[: spec.max_frames * spec.hop], spec), cut


def _read(data: bytes, spec: AudioSpec) -> tuple[np.ndarray, int, bool]:
    """(samples,) float32 mono at the file's own rate, at most `max_seconds` of it; the rate; whether it was cut."""
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as sound:
            _check_header(sound)
            wanted = math.ceil(spec.max_seconds * sound.samplerate)
            if wanted * sound.channels > MAX_SAMPLES:
                raise SampleError("bomb", f"a sound with {sound.channels} channels at {sound.samplerate} Hz")
            values = sound.read(min(wanted, sound.frames), dtype="float32", always_2d=True)
            cut, rate = sound.frames > wanted, sound.samplerate
    except (soundfile.SoundFileError, TypeError, ValueError, OSError) as error:
        detail = str(getattr(error, "error_string", error)).strip(". ")
        what = "the file is empty" if not data else f"the sound cannot be decoded ({detail})"
        raise SampleError(
            "unreadable_audio", what, wanted="WAV, FLAC, OGG or MP3", cure="is the file complete?"
        ) from None
    if not len(values):
        raise SampleError("empty_sound", "a sound of no length", wanted="at least one sample")
    if not np.isfinite(values).all():
        raise SampleError("unreadable_audio", "the sound holds values that are not numbers")
    return values.mean(axis=1) if values.shape[1] > 1 else values[:, 0], rate, cut


def _check_header(sound: soundfile.SoundFile) -> None:
    if sound.format not in FORMATS:
        raise SampleError("unsupported", f"a sound file of format {sound.format}", wanted="WAV, FLAC, OGG or MP3")
    if not MIN_RATE <= sound.samplerate <= MAX_RATE:
        raise SampleError("bomb", f"a sample rate of {sound.samplerate:,} Hz", wanted=f"{MIN_RATE:,} to {MAX_RATE:,}")
    if sound.frames <= 0:
        raise SampleError("empty_sound", "a sound of no length", wanted="at least one sample")


def log_mel(wave: np.ndarray, spec: AudioSpec) -> np.ndarray:
    """(samples,) at the spec's rate → (frames, n_mels) float16. Silence is the floor everywhere.

    A sound shorter than one window is filled up with zeros to one window; frames = 1 + (samples - n_fft) // hop.
    """
    if len(wave) < spec.n_fft:
        wave = np.pad(wave, (0, spec.n_fft - len(wave)))
    window, columns, weights, starts = _constants(spec.sample_rate, spec.n_fft, spec.n_mels)
    # float64: with float32 the float16 that is kept would differ between CPUs in one value of some ten thousand
    frames = np.lib.stride_tricks.sliding_window_view(wave, spec.n_fft)[:: spec.hop] * window
    spectrum = np.fft.rfft(frames)
    power = np.square(spectrum.real)
    power += np.square(spectrum.imag)
    runs = power[:, columns]
    runs *= weights
    mel = np.add.reduceat(runs, starts, axis=1)
    loudest = mel.max()
    if loudest <= 0:
        return np.full(mel.shape, spec.floor, np.float16)
    mel /= loudest
    np.maximum(mel, 10.0**spec.floor, out=mel)
    return np.log10(mel, out=mel).astype(np.float16)


@functools.lru_cache(8)
def _constants(rate: int, n_fft: int, n_mels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Periodic Hann window; and the filters as runs: bins of all filters in a row, their weights, where each starts."""
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)
    frequencies = np.arange(n_fft // 2 + 1) * rate / n_fft
    edges = _hertz(np.linspace(0.0, _mel(rate / 2), n_mels + 2))
    columns: list[np.ndarray] = []
    weights: list[np.ndarray] = []
    for low, middle, high in zip(edges, edges[1:], edges[2:], strict=False):
        rise, fall = (frequencies - low) / (middle - low), (high - frequencies) / (high - middle)
        triangle = np.maximum(0, np.minimum(rise, fall)) * 2 / (high - low)
        bins = np.flatnonzero(triangle)
        bins = bins if len(bins) else np.array([0])  # a filter between two bins hears nothing: weight 0
        columns.append(bins)
        weights.append(triangle[bins])
    starts = np.cumsum([0, *(len(c) for c in columns[:-1])])
    return window, np.concatenate(columns), np.concatenate(weights), starts


_LINEAR_HZ = 200 / 3  # Hz a mel below 1 kHz
_LOG_STEP = math.log(6.4) / 27  # natural log of the frequency ratio a mel above


def _mel(hertz: float) -> float:
    return hertz / _LINEAR_HZ if hertz < 1000 else 15 + math.log(hertz / 1000) / _LOG_STEP


def _hertz(mel: np.ndarray) -> np.ndarray:
    return np.where(mel < 15, mel * _LINEAR_HZ, 1000 * np.exp((mel - 15) * _LOG_STEP))
