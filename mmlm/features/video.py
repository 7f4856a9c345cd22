"""Video → frames at a rate and the sound track, by PyAV (the extra `video`).

Only containers and codecs of a list are opened: FFmpeg also knows playlists, which name other files. Sizes are checked
in the header, and the decoder is told them too; how much is decoded for one video is bounded. One thread decodes, so
that the same file gives the same frames. Frames turn upright as the header says.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mmlm.corpus.sniff import sniff
from mmlm.features.audio import LONGEST_SILENCE, MAX_RATE, MAX_SAMPLES, MIN_RATE, Span, wave_to_mel
from mmlm.features.failures import SampleError
from mmlm.features.image import fit_pixels
from mmlm.features.spec import AudioSpec, ImageSpec, VideoSpec

CONTAINERS = {"mp4": "mov", "mov": "mov", "webm": "matroska", "mkv": "matroska", "avi": "avi"}
"""What `mmlm.corpus.sniff` calls it → FFmpeg's name of the reader."""
VIDEO_CODECS = frozenset(
    ("h264", "hevc", "av1", "libdav1d", "libaom-av1", "vp8", "vp9", "libvpx", "libvpx-vp9", "mpeg4", "mpeg2video",
     "mpeg1video", "msmpeg4v3", "h263", "mjpeg", "theora")
)  # fmt: skip
AUDIO_CODECS = frozenset(
    ("aac", "aac_latm", "mp3", "mp3float", "mp2", "mp2float", "opus", "libopus", "vorbis", "flac", "alac", "ac3", "eac3")
)  # fmt: skip
MAX_FRAME_PIXELS = 36_000_000
"""Pixels of one frame."""
MAX_DECODED_PIXELS = 8_000_000_000
"""Pixels decoded for one video on the way to the wanted frames; 4,000 frames of 1080 lines."""
SEEK_FROM = 3.0
"""Seconds; frames that lie further apart are jumped to, nearer ones are decoded up to."""


@dataclass(slots=True)
class Video:
    frames: list[np.ndarray] = field(default_factory=list)
    """Each (size, size, channels) uint8."""
    sound: np.ndarray | None = None
    """(frames, mels) log-mel; None without a sound track."""
    cut: bool = False
    """Whether the sound was longer than its spec allows."""


def version() -> str:
    """Of PyAV and the FFmpeg inside it; "" when it is not installed."""
    try:
        import av
    except ImportError:
        return ""
    return f"{av.__version__} {av.library_versions}"


def decode_video(
    data: bytes, video: VideoSpec, image: ImageSpec | None, audio: AudioSpec | None, span: Span | None = None
) -> Video:
    """The frames (none where `image` is None) and the sound (None where `audio` is None) of a video or its `span`.

    Raises SampleError: `unreadable_video`, `bomb`, `unsupported`, `too_long`.
    """
    try:
        import av
    except ImportError:
        raise SampleError(
            "unsupported", "a video, and PyAV is not installed", cure="pip install 'mmlm-workflows[video]'"
        ) from None
    kind, form = sniff(data[:4096])
    if kind != "video" or form not in CONTAINERS:
        what = "the file is empty" if not data else "the file is no video that can be read"
        raise SampleError("unreadable_video", what, wanted="MP4, MOV, WebM, MKV or AVI")
    found = Video()
    try:
        if image:
            with av.open(io.BytesIO(data), format=CONTAINERS[form], metadata_errors="replace") as container:
                found.frames = [fit_pixels(frame, image) for frame in _frames(container, video, span)]
        if audio and video.sound:
            with av.open(io.BytesIO(data), format=CONTAINERS[form], metadata_errors="replace") as container:
                heard = _sound(container, audio, span)
                if heard is not None:
                    found.sound, found.cut = wave_to_mel(*heard, audio)
    except SampleError:
        raise
    except (av.FFmpegError, ValueError, OSError, OverflowError, ArithmeticError) as error:
        raise SampleError(
            "unreadable_video", f"the video cannot be decoded ({error})", cure="is the file complete?"
        ) from None
    if not found.frames and found.sound is None and (image or (audio and video.sound)):
        raise SampleError("unreadable_video", "a video without a frame or a sound", wanted="at least one")
    return found


def _frames(container: Any, spec: VideoSpec, span: Span | None) -> Iterator[np.ndarray]:
    """(H, W, 3) uint8 RGB, upright, at the wanted times."""
    if not container.streams.video:
        return
    stream = container.streams.video[0]
    context = _checked(stream, VIDEO_CODECS)
    if not 0 < context.width * context.height <= MAX_FRAME_PIXELS:
        raise SampleError(
            "bomb",
            f"a video of {context.width} × {context.height} pixels",
            wanted=f"at most {MAX_FRAME_PIXELS:,} pixels",
        )
    context.thread_count = 1
    context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}
    begin = float(stream.start_time * stream.time_base) if stream.start_time is not None else 0.0
    stamps = _times(_seconds(container, stream), spec, span)
    decoded, at, shown = 0, -math.inf, None
    frames = container.decode(stream)
    for wanted in stamps:
        if wanted - max(at, 0.0) > SEEK_FROM:
            container.seek(round((begin + wanted) / stream.time_base), stream=stream)
            frames, shown = container.decode(stream), None
        while shown is None or at < wanted - 1e-6:
            following = next(frames, None)
            if following is None:
                return
            decoded += following.width * following.height
            if decoded > MAX_DECODED_PIXELS:
                raise SampleError(
                    "bomb", f"more than {MAX_DECODED_PIXELS:,} pixels to decode", cure="lower fps or max_frames"
                )
            if following.time is not None:
                shown, at = following, following.time - begin
            elif shown is None:
                shown, at = following, max(at, 0.0)
        yield _upright(shown)


def _times(seconds: float, spec: VideoSpec, span: Span | None) -> list[float]:
    """Seconds from the beginning at which frames are wanted, at most `max_frames` of them."""
    start, end = span or (0.0, seconds)
    end = min(end, seconds) if seconds else end
    if start >= end and (span or seconds):
        raise SampleError("unreadable_video", f"nothing between {start:g} and {end:g} s of a video")
    count = max(1, math.ceil((end - start) * spec.fps - 1e-6)) if end > start else spec.max_frames
    if count > spec.max_frames and spec.spread:
        return [start + i * (end - start) / spec.max_frames for i in range(spec.max_frames)]
    return [start + i / spec.fps for i in range(min(count, spec.max_frames))]


def _seconds(container: Any, stream: Any) -> float:
    """Length by the header; 0 when it does not say."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    return container.duration / 1_000_000 if container.duration else 0.0


def _upright(frame: Any) -> np.ndarray:
    pixels: np.ndarray = frame.to_ndarray(format="rgb24")
    return np.rot90(pixels, round((getattr(frame, "rotation", 0) or 0) / 90))


def _sound(container: Any, spec: AudioSpec, span: Span | None) -> tuple[np.ndarray, int, bool] | None:
    """(samples,) float32 mono, its rate, and whether it goes on; None without a sound track."""
    import av

    if not container.streams.audio:
        return None
    stream = container.streams.audio[0]
    context = _checked(stream, AUDIO_CODECS)
    rate, channels = context.sample_rate, context.channels
    if not MIN_RATE <= rate <= MAX_RATE:
        raise SampleError("bomb", f"a sample rate of {rate:,} Hz", wanted=f"{MIN_RATE:,} to {MAX_RATE:,}")
    longest = spec.max_seconds + (0 if spec.trim_db is None else LONGEST_SILENCE)
    if math.ceil(longest * rate) * channels > MAX_SAMPLES:
        raise SampleError("bomb", f"a sound with {channels} channels at {rate} Hz")
    begin = float(stream.start_time * stream.time_base) if stream.start_time is not None else 0.0
    start, end = span or (0.0, math.inf)
    if start > SEEK_FROM:
        container.seek(round((begin + start - 1) / stream.time_base), stream=stream)
    wanted = math.ceil(min(longest, end - start) * rate)
    # interleaved: of planes PyAV 18 counts one too many where there are eight, and reads beyond them
    resampler = av.AudioResampler(format="flt")  # layout and rate as they are
    pieces: list[np.ndarray] = []
    have, first = 0, True
    for frame in container.decode(stream):
        skip = 0
        if first and frame.time is not None:
            skip = round((start - (frame.time - begin)) * rate)
        for part in resampler.resample(frame):
            waves = part.to_ndarray().reshape(part.samples, part.layout.nb_channels)
            wave = np.ascontiguousarray(waves.T).mean(axis=0)
            if first and skip >= len(wave):
                skip -= len(wave)
                continue
            pieces.append(wave[max(0, skip) :])
            have, first = have + len(pieces[-1]), False
        if have > wanted:
            break
    if not have:
        return None
    wave = np.concatenate(pieces)
    if not np.isfinite(wave).all():
        raise SampleError("unreadable_video", "the sound of the video holds values that are not numbers")
    return wave[:wanted], rate, have > wanted and end - start > longest


def _checked(stream: Any, allowed: frozenset[str]) -> Any:
    """The codec of a stream, if it is one of those that are read. Raises SampleError `unsupported`."""
    context = stream.codec_context  # None where FFmpeg knows no decoder at all
    name = context.name if context else "unknown"
    if name not in allowed and not (allowed is AUDIO_CODECS and name.startswith("pcm_")):
        raise SampleError("unsupported", f"a video with the codec {name!r}", wanted=", ".join(sorted(allowed)))
    return context
