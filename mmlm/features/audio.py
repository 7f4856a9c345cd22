"""Sound → log-mel: WAV, FLAC, OGG, MP3 and AIFF become (frames, mels).

One channel, resampled; power spectrum of Hann windows; triangular filters of unit area, evenly spaced on Slaney's
mel scale (M. Slaney, Auditory Toolbox, Interval Research TR 1998-010: linear below 1 kHz, logarithmic above); then one of
two scales. `relative`: log10 relative to the loudest value of the sound, floored, so that the result does not depend on
the level. `whisper`: what the encoders of Whisper were trained on (A. Radford et al., Robust Speech Recognition via
Large-Scale Weak Supervision, 2022).

`relative` is computed in single precision, two thirds of the time of double: it differs from double by up to 5e-4 (a loud
tone at the Nyquist frequency beside faint noise; 2e-5 for noise), and float16, as it is kept, rounds by 2e-3. `whisper`
reaches 8 decades down, where single precision would miss by 8e-4: frames with a value that is faint beside the rest of its
frame are computed again in double, and all hold 1e-4 (4e-5 in speech).
The product with the filters is a sparse one: the last bits of a dense one depend on the number of threads, and shards are
byte-reproducible. All goes block by block, so that the spectra stay in a core's second-level cache, with the frames along
the last axis, along which transform and filters run.
"""

from __future__ import annotations

import functools
import io
import math
from typing import Any

import numpy as np
import soundfile
import soxr

from mmlm.features.failures import SampleError
from mmlm.features.spec import AudioSpec
from mmlm.sound_file import open_sound

FORMATS = ("WAV", "WAVEX", "RF64", "FLAC", "OGG", "MP3", "AIFF")
MAX_SAMPLES = 64_000_000
"""Values decoded from one file at most (frames × channels)."""
LOUDEST = 1e10
"""Largest value of a sound; 1 is full scale where values are fractions, 2³¹ where somebody forgot to scale integers."""
MIN_RATE, MAX_RATE = 1_000, 384_000
"""Sample rates that are taken, Hz."""
LONGEST_SILENCE = 120.0
"""Seconds of silence at the beginning that trimming looks behind."""
TRIM_STEP = 0.01
"""Seconds; loudness is compared from step to step."""
TRIM_MARGIN = 5
"""Steps kept before the first and behind the last loud one."""
FAINTEST = 1e-24
"""Power below which the floor of `relative` would leave the range of single precision: such sounds are made louder."""
FAINT = 1e-8
"""Share of a frame's power below which single precision does not tell a value of Whisper's scale."""
BLOCK = 256
"""Frames computed together: they and their spectra fit into a core's second-level cache (1 MB)."""

Span = tuple[float, float]
"""From and to, in seconds."""


def decode_audio(data: bytes, spec: AudioSpec, span: Span | None = None) -> np.ndarray:
    """The sound, or the `span` of it, as (frames, n_mels) of `spec.stored`; what is longer than `max_seconds` is cut.

    Values: [floor, 0] on the scale `relative`; on `whisper` at least -1.5 and at most 2 below the loudest.
    Raises SampleError: `unreadable_audio`, `empty_sound`, `bomb`, `unsupported`, `too_long` (where the spec says so).
    """
    return decode_sound(data, spec, span)[0]


def decode_sound(data: bytes, spec: AudioSpec, span: Span | None = None) -> tuple[np.ndarray, bool]:
    """As `decode_audio`, and whether the sound was cut at `max_seconds`."""
    return wave_to_mel(*_read(data, spec, span), spec)


def wave_to_mel(wave: np.ndarray, rate: int, more: bool, spec: AudioSpec) -> tuple[np.ndarray, bool]:
    """(samples,) float32 at `rate` Hz → its log-mel, and whether it was cut. `more`: the sound goes on behind `wave`."""
    cut = more
    if spec.trim_db is not None:
        first, last = _loud(wave, rate, spec.trim_db)
        cut = more and last == len(wave)
        wave = wave[first:last]
    longest = math.ceil(spec.max_seconds * rate)
    if len(wave) > longest:
        wave, cut = wave[:longest], True
    if cut and spec.on_long == "refuse":
        raise SampleError(
            "too_long", f"a sound of more than {spec.max_seconds:g} s", wanted=f"at most {spec.max_seconds:g} s",
            cure="raise max_seconds, cut it in the scan (`pieces`), or say `on_long: cut`",
        )  # fmt: skip
    if rate != spec.sample_rate:
        wave = soxr.resample(wave, rate, spec.sample_rate, quality="HQ")
    return log_mel(wave[: spec.max_frames * spec.hop], spec), cut


def _read(data: bytes, spec: AudioSpec, span: Span | None) -> tuple[np.ndarray, int, bool]:
    """(samples,) float32 mono at the file's own rate, no more of it than is needed; the rate; whether there is more."""
    try:
        with open_sound(io.BytesIO(data)) as sound:
            _check_header(sound)
            rate, first, last = sound.samplerate, 0, sound.frames
            if span:
                first, last = round(span[0] * rate), min(sound.frames, round(span[1] * rate))
                if first >= last:
                    raise SampleError(
                        "empty_sound", f"nothing between {span[0]:g} and {span[1]:g} s of a sound",
                        wanted=f"a piece of its {sound.frames / rate:g} s",
                    )  # fmt: skip
            wanted = math.ceil((spec.max_seconds + (0 if spec.trim_db is None else LONGEST_SILENCE)) * rate)
            wanted = min(wanted, last - first)
            if wanted * sound.channels > MAX_SAMPLES:
                raise SampleError(
                    "bomb", f"{wanted / rate:,.0f} s of a sound with {sound.channels} channels at {rate} Hz",
                    wanted=f"at most {MAX_SAMPLES:,} samples, {MAX_SAMPLES / sound.channels / rate:,.0f} s",
                    cure="lower max_seconds, or cut it in the scan (`pieces`)",
                )  # fmt: skip
            if first:
                sound.seek(first)
            # libsndfile makes floats of 16 bits nine times slower than numpy; the values are the same
            values = sound.read(wanted, dtype="int16" if sound.subtype == "PCM_16" else "float32", always_2d=True)
    except (soundfile.SoundFileError, TypeError, ValueError, OSError) as error:
        detail = str(getattr(error, "error_string", error)).strip(". ")
        what = "the file is empty" if not data else f"the sound cannot be decoded ({detail})"
        raise SampleError(
            "unreadable_audio", what, wanted="WAV, FLAC, OGG, MP3 or AIFF", cure="is the file complete?"
        ) from None
    if not len(values):
        raise SampleError("empty_sound", "a sound of no length", wanted="at least one sample")
    if values.dtype == np.int16:
        values = values.astype(np.float32)
        values /= np.float32(32768)
    elif not np.abs(values).max() <= LOUDEST:  # also where one is not a number
        raise SampleError(
            "unreadable_audio", "the sound holds values that are no sound", wanted=f"at most {LOUDEST:,.0f}"
        )
    return _mono(values), rate, wanted < last - first


def _mono(values: np.ndarray) -> np.ndarray:
    """(samples, channels) → the mean of the channels."""
    if values.shape[1] == 1:
        return values[:, 0]
    if values.shape[1] == 2:  # as the mean, five times as fast
        return (values[:, 0] + values[:, 1]) / np.float32(2)
    mean: np.ndarray = values.mean(axis=1)
    return mean


def _check_header(sound: soundfile.SoundFile) -> None:
    if sound.format not in FORMATS:
        raise SampleError("unsupported", f"a sound file of format {sound.format}", wanted="WAV, FLAC, OGG, MP3 or AIFF")
    if not MIN_RATE <= sound.samplerate <= MAX_RATE:
        raise SampleError("bomb", f"a sample rate of {sound.samplerate:,} Hz", wanted=f"{MIN_RATE:,} to {MAX_RATE:,}")
    if sound.frames <= 0:
        raise SampleError("empty_sound", "a sound of no length", wanted="at least one sample")


def _loud(wave: np.ndarray, rate: int, below: float) -> tuple[int, int]:
    """First and last + 1 sample of what is no more than `below` decibels weaker than the loudest 10 ms, with a margin.

    All of it where it is silent or shorter than a step.
    """
    step = round(rate * TRIM_STEP)
    steps = len(wave) // step
    if not steps:
        return 0, len(wave)
    power = np.square(wave[: steps * step].reshape(steps, step), dtype=np.float64).mean(axis=1)
    loud = np.flatnonzero(power >= power.max() * 10 ** (-below / 10))
    if power.max() <= 0:
        return 0, len(wave)
    first, last = max(0, loud[0] - TRIM_MARGIN) * step, (loud[-1] + 1 + TRIM_MARGIN) * step
    return int(first), len(wave) if last >= steps * step else int(last)


def log_mel(wave: np.ndarray, spec: AudioSpec) -> np.ndarray:
    """(samples,) at the spec's rate → (frames, n_mels) of `spec.stored`. Silence is `spec.silence` everywhere.

    A sound shorter than one window is filled up with zeros to one window. `relative`: frames = 1 + (samples - n_fft) //
    hop. `whisper`: windows are centred on multiples of the hop, the sound is mirrored at its ends, and the last frame is
    dropped: frames = samples // hop. (Whisper itself first fills every sound up to 30 s with zeros.)
    """
    if len(wave) < spec.n_fft:
        wave = np.pad(wave, (0, spec.n_fft - len(wave)))
    dtype = np.dtype(spec.stored)
    if spec.scale == "whisper":
        mel = _whisper_power(np.pad(wave, spec.n_fft // 2, mode="reflect").astype(np.float32, copy=False), spec)
        np.log10(np.maximum(mel, 1e-10, out=mel), out=mel)
        np.maximum(mel, max(mel.max() - 8, -10), out=mel)  # the logarithm of 1e-10 is rounded
        mel += 4
        mel /= 4
    else:
        wave = wave.astype(np.float32, copy=False)
        mel = _mel_power(_windows(wave, spec), spec)
        if (loudest := mel.max()) < FAINTEST and (peak := np.abs(wave).max()):
            mel = _mel_power(
                _windows(np.ldexp(wave, -np.frexp(peak)[1]), spec), spec
            )  # by a power of two: nothing is rounded
            loudest = mel.max()
        if loudest <= 0:
            return np.full(mel.shape[::-1], spec.floor, dtype)
        mel /= loudest
        np.log10(np.maximum(mel, 10.0**spec.floor, out=mel), out=mel)
    return np.ascontiguousarray(mel.T).astype(dtype, copy=False)


def _whisper_power(wave: np.ndarray, spec: AudioSpec) -> np.ndarray:
    """(n_mels, frames) float32, without the last window: to 9e-4 of itself (1e-4 of the scale) wherever it is above the floor.

    A transform of n values x in single precision misses each |X| by some 2⁻²⁴ |x|, and a sum M of squares under a filter
    of area W by the share 2 · 2⁻²⁴ |x| √(W / M). Where M < FAINT · W · Σ|X|², that is too much.
    """
    windows = _windows(wave, spec)[:, :-1]
    energy = np.empty(windows.shape[1], wave.dtype)
    mel = _mel_power(windows, spec, energy)
    unsure = FAINT * _constants(spec.sample_rate, spec.n_fft, spec.n_mels, wave.dtype)[2] * energy
    floor = max(mel.max() * 1e-8, 1e-10)  # what lies below it is the floor, whatever it is
    again = np.flatnonzero(((mel < unsure) & (unsure > floor / 2)).any(axis=0))
    if len(again):
        mel[:, again] = _mel_power(windows[:, again].astype(np.float64), spec)
    return mel


def _windows(wave: np.ndarray, spec: AudioSpec) -> np.ndarray:
    """(n_fft, frames): the windows that lie within `wave`, a view of it."""
    count, (step,) = 1 + (len(wave) - spec.n_fft) // spec.hop, wave.strides
    return np.lib.stride_tricks.as_strided(wave, (spec.n_fft, count), (step, spec.hop * step), writeable=False)


def _mel_power(windows: np.ndarray, spec: AudioSpec, energy: np.ndarray | None = None) -> np.ndarray:
    """(n_fft, frames) → the power in each filter (n_mels, frames), in the precision of `windows`; that of all frequencies
    comes into `energy` (frames,) where it is given."""
    from scipy import fft

    window, filters, _ = _constants(spec.sample_rate, spec.n_fft, spec.n_mels, windows.dtype)
    mel = np.empty((spec.n_mels, windows.shape[1]), windows.dtype)
    for at in range(0, windows.shape[1], BLOCK):
        frames = np.multiply(windows[:, at : at + BLOCK], window, order="C")
        spectra = fft.rfft(frames, axis=0, workers=1)
        power = np.square(spectra.real)
        power += np.square(spectra.imag)
        mel[:, at : at + BLOCK] = filters @ power
        if energy is not None:
            power.sum(axis=0, out=energy[at : at + BLOCK])
    return mel


@functools.lru_cache(8)
def _constants(rate: int, n_fft: int, n_mels: int, dtype: np.dtype) -> tuple[np.ndarray, Any, np.ndarray]:
    """Periodic Hann window (n_fft, 1), the filters as a sparse matrix (n_mels, n_fft // 2 + 1), their areas (n_mels, 1)."""
    from scipy.sparse import csr_array

    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)
    frequencies = np.arange(n_fft // 2 + 1) * rate / n_fft
    edges = _hertz(np.linspace(0.0, _mel(rate / 2), n_mels + 2))
    low, middle, high = (edges[i : i + n_mels, None] for i in range(3))
    rise, fall = (frequencies - low) / (middle - low), (high - frequencies) / (high - middle)
    filters = np.maximum(0, np.minimum(rise, fall)) * 2 / (high - low)
    areas = filters.sum(axis=1, keepdims=True)
    return window[:, None].astype(dtype), csr_array(filters.astype(dtype)), areas.astype(dtype)


_LINEAR_HZ = 200 / 3  # Hz a mel below 1 kHz
_LOG_STEP = math.log(6.4) / 27  # natural log of the frequency ratio a mel above


def _mel(hertz: float) -> float:
    return hertz / _LINEAR_HZ if hertz < 1000 else 15 + math.log(hertz / 1000) / _LOG_STEP


def _hertz(mel: np.ndarray) -> np.ndarray:
    return np.where(mel < 15, mel * _LINEAR_HZ, 1000 * np.exp((mel - 15) * _LOG_STEP))
