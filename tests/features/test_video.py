from __future__ import annotations

import io
import struct
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from mmlm.corpus.records import Part, Record, Target
from mmlm.features import video
from mmlm.features.audio import decode_audio
from mmlm.features.config import TokenizerConfig
from mmlm.features.encode import Encoder
from mmlm.features.failures import SampleError
from mmlm.features.spec import AUDIO, IMAGE, AudioSpec, FeatureSpec, ImageSpec, TaskSpec, VideoSpec
from mmlm.features.text import train_tokenizer
from mmlm.features.video import decode_video

av = pytest.importorskip("av")

PICTURES = ImageSpec(size=16, patch=8, channels=1, resize="stretch")
SOUNDS = AudioSpec(n_mels=20, max_seconds=6.0)
FORMS = {"mp4": ("mpeg4", "aac"), "mov": ("mpeg4", "aac"), "avi": ("mpeg4", "mp3"), "matroska": ("mjpeg", "mp3")}


def make(
    form: str = "mp4", seconds: float = 4.0, fps: int = 10, size: tuple[int, int] = (64, 48), sound: bool = True,
    pictures: bool = True,
) -> bytes:  # fmt: skip
    """A film that grows lighter by 20 levels a second from 40 on, black in its right quarter; a tone that changes as often."""
    out = io.BytesIO()
    codecs = FORMS[form]
    with av.open(out, "w", format=form) as container:
        if pictures:
            stream: Any = container.add_stream(codecs[0], rate=fps)
            stream.width, stream.height = size
            stream.pix_fmt = "yuvj420p" if codecs[0] == "mjpeg" else "yuv420p"
            stream.bit_rate = 4_000_000
        if sound:
            audio: Any = container.add_stream(codecs[1], rate=16000)
            audio.layout = "mono"
        for i in range(round(seconds * fps) if pictures else 0):
            pixels = np.full((size[1], size[0], 3), 40 + 20 * (i // fps), np.uint8)
            pixels[:, -size[0] // 4 :] = 0
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = i
            container.mux(stream.encode(frame))
        if pictures:
            container.mux(stream.encode(None))
        if sound:
            wave = tones(seconds)
            form_of = audio.codec_context.format.name
            assert form_of in ("s32p", "fltp")
            values = (wave * (2**31 - 1)).astype(np.int32)[None] if form_of == "s32p" else wave[None].astype(np.float32)
            whole = av.AudioFrame.from_ndarray(values, format=form_of, layout="mono")
            whole.sample_rate, whole.pts = 16000, 0
            fifo = av.AudioFifo()
            fifo.write(whole)
            while (frame := fifo.read(audio.codec_context.frame_size or 1024, partial=True)) is not None:
                container.mux(audio.encode(frame))
            container.mux(audio.encode(None))
    return out.getvalue()


def tones(seconds: float) -> np.ndarray:
    t = np.arange(round(16000 * seconds)) / 16000
    return 0.4 * np.sin(2 * np.pi * (500 + 700 * np.floor(t)) * t)


def levels(frames: list[np.ndarray]) -> list[int]:
    return [round((float(frame[4:12, 2:8].mean()) - 40) / 20) for frame in frames]


@pytest.mark.parametrize("form", FORMS)
def test_frames_at_a_rate_and_the_sound(form: str) -> None:
    found = decode_video(make(form), VideoSpec(fps=1.0, max_frames=8), PICTURES, SOUNDS)
    assert levels(found.frames) == [0, 1, 2, 3]
    assert all(frame.shape == (16, 16, 1) and frame.dtype == np.uint8 for frame in found.frames)
    assert found.frames[0][:, -2:].max() < 30  # the dark quarter is on the right
    assert found.sound is not None
    assert not found.cut
    wanted = decode_audio(wav(tones(4.0)), SOUNDS).astype(float)
    assert abs(len(found.sound) - len(wanted)) <= 15  # a codec's first and last blocks
    for second in range(4):
        middle = slice(100 * second + 30, 100 * second + 70)
        assert found.sound[middle].astype(float).mean(0).argmax() == wanted[middle].mean(0).argmax()


def wav(wave: np.ndarray) -> bytes:
    import soundfile

    out = io.BytesIO()
    soundfile.write(out, wave, 16000, format="WAV")
    return out.getvalue()


def test_long_videos_are_spread_or_cut() -> None:
    data = make(seconds=8.0, sound=False)
    assert levels(decode_video(data, VideoSpec(fps=2.0, max_frames=4), PICTURES, None).frames) == [0, 2, 4, 6]
    cut = VideoSpec(fps=2.0, max_frames=4, spread=False)
    assert levels(decode_video(data, cut, PICTURES, None).frames) == [0, 0, 1, 1]
    apart = VideoSpec(fps=1 / 3.5, max_frames=9)  # jumps from frame to frame
    assert levels(decode_video(data, apart, PICTURES, None).frames) == [0, 3, 7]


def test_a_span_of_a_video() -> None:
    data = make(seconds=8.0)
    found = decode_video(data, VideoSpec(fps=1.0), PICTURES, SOUNDS, (5.0, 7.0))
    assert levels(found.frames) == [5, 6]
    assert found.sound is not None
    assert abs(len(found.sound) - 200) <= 6
    assert found.sound[30:70].astype(float).mean(0).argmax() == (
        decode_audio(wav(tones(8.0)), AudioSpec(n_mels=20), (5.0, 6.0))[30:70].astype(float).mean(0).argmax()
    )
    assert reason(data, span=(9.0, 10.0)) == "unreadable_video"


def test_long_sounds_are_cut_and_counted() -> None:
    found = decode_video(make(), VideoSpec(), PICTURES, AudioSpec(n_mels=20, max_seconds=1.0))
    assert found.cut
    assert found.sound is not None
    assert len(found.sound) == 98
    assert decode_video(make(), VideoSpec(sound=False), PICTURES, SOUNDS).sound is None
    assert decode_video(make(sound=False), VideoSpec(), PICTURES, SOUNDS).sound is None
    assert decode_video(make(), VideoSpec(), None, SOUNDS).frames == []


def reason(data: bytes, span: tuple[float, float] | None = None) -> str:
    with pytest.raises(SampleError) as caught:
        decode_video(data, VideoSpec(), PICTURES, SOUNDS, span)
    return caught.value.reason


def test_failures_are_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    data = make(seconds=1.0)
    assert reason(b"") == "unreadable_video"
    assert reason(b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n") == "unreadable_video"
    assert reason(b"ffconcat version 1.0\nfile /etc/passwd\n") == "unreadable_video"
    assert reason(data[:40]) == "unreadable_video"
    assert reason(data[: len(data) // 2]) == "unreadable_video"  # the table of an MP4 stands at its end
    assert reason(make(seconds=1.0, pictures=False, sound=False) or b"") == "unreadable_video"
    monkeypatch.setattr(video, "MAX_FRAME_PIXELS", 3000)
    assert reason(data) == "bomb"  # 64 × 48 pixels
    monkeypatch.undo()
    monkeypatch.setattr(video, "MAX_DECODED_PIXELS", 3000)
    assert reason(data) == "bomb"


def outcome(data: bytes) -> str:
    try:
        decode_video(data, VideoSpec(), PICTURES, SOUNDS)
    except SampleError as error:
        return error.reason
    return "decoded"


def test_damage_is_typed_and_ends() -> None:
    rng = np.random.default_rng(0)
    whole, seen = make(seconds=1.0), set()
    for _ in range(30):
        broken = bytearray(whole)
        for at in rng.integers(0, len(broken), 5):
            broken[at] ^= 1 << rng.integers(8)
        seen.add(outcome(bytes(broken)))
    assert seen <= {"decoded", "unreadable_video", "bomb", "unsupported"}


def test_without_pyav_it_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['av'] = None\n"
        "from mmlm.features.spec import *; from mmlm.features.video import decode_video\n"
        "try: decode_video(b'', VideoSpec(), ImageSpec(size=8, patch=8, channels=1), None)\n"
        "except Exception as e: print(e.reason, e)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.startswith("unsupported")
    assert "mmlm-workflows[video]" in said


def test_a_record_with_a_video() -> None:
    tokenizer = train_tokenizer(["What happens?"], TokenizerConfig(vocab_size=300))
    spec = FeatureSpec(
        vocab_size=tokenizer.vocab_size, tokenizer_digest=tokenizer.digest, max_len=200, image=PICTURES, audio=SOUNDS,
        video=VideoSpec(fps=1.0, max_frames=3), tasks=[TaskSpec(name="answer")],
    )  # fmt: skip
    record = Record(
        "r", (Part("video", uri="a.mp4#t=1,3"), Part("text", text="What happens?")), target=Target(label="day")
    )
    sample = Encoder(spec, tokenizer).encode(record, lambda part: make())
    assert levels(sample.images) == [1, 2]
    assert len(sample.sounds) == 1
    assert sample.tokens[1:4].tolist() == [IMAGE, IMAGE, AUDIO]
    assert spec.video_bytes == 3 * spec.image_bytes + spec.audio_bytes
    still = spec.model_copy(update={"audio": None})
    assert Encoder(still, tokenizer).encode(record, lambda part: make()).sounds == []
    with pytest.raises(SampleError, match="a video"):
        Encoder(spec.model_copy(update={"video": None}), tokenizer).encode(record, lambda part: make())


def corner(form: str = "mp4", degrees: int = 0) -> bytes:
    """A film of 64 x 48 pixels whose upper left quarter is white; `degrees` is what its display matrix says."""
    out = io.BytesIO()
    with av.open(out, "w", format=form) as container:
        stream: Any = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 48, "yuv420p", 1_000_000
        if degrees:
            stream.set_display_rotation(degrees)
        pixels = np.zeros((48, 64, 3), np.uint8)
        pixels[:24, :32] = 255
        for i in range(5):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = i
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return out.getvalue()


def white(data: bytes) -> str:
    """Where the white quarter is once the film is decoded."""
    (frame, *_) = decode_video(data, VideoSpec(fps=1, max_frames=1), PICTURES, None).frames
    means = {
        f"{v} {h}": frame[8 * i : 8 * i + 8, 8 * j : 8 * j + 8].mean()
        for i, v in enumerate(("upper", "lower"))
        for j, h in enumerate(("left", "right"))
    }
    assert sorted(means.values())[2] < 30 < 220 < max(means.values())
    return max(means, key=lambda k: means[k])


@pytest.mark.parametrize("form", ["mp4", "mov"])
def test_a_film_is_turned_as_its_display_matrix_says(form: str) -> None:
    assert white(corner(form)) == "upper left"
    # PyAV counts against the clock: a quarter turn to the left brings the upper left corner down
    assert [white(corner(form, d)) for d in (90, 180, 270)] == ["lower left", "lower right", "upper right"]


def test_a_film_from_a_telephone_held_upright() -> None:
    """The matrix that telephones write, put there by hand (ISO 14496-12, 8.3.2): (x, y) goes to (height - y, x)."""
    film = corner()
    at = film.index(b"tkhd") + 4 + 40
    plain = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    assert film[at : at + 36] == plain
    turned = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 48 << 16, 0, 1 << 30)
    assert white(film[:at] + turned + film[at + 36 :]) == "upper right"
