"""What a media file is, from its first bytes and its header alone; nothing is decoded here."""

from __future__ import annotations

import io
import re
import warnings
from dataclasses import dataclass

from mmlm.corpus.drafts import RefuseError

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".svg")
AUDIO_ENDINGS = (".wav", ".ogg", ".oga", ".opus", ".flac", ".mp3")
VIDEO_ENDINGS = (".mp4", ".webm", ".mkv", ".mov", ".avi")
TEXT_ENDINGS = (".txt", ".md")
_PILLOW = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]
_SVG = re.compile(rb"<svg[\s>]|<!DOCTYPE\s+svg|<[A-Za-z]+:svg[\s>]")


@dataclass(frozen=True, slots=True)
class Header:
    """`kind` image: width and height in pixels (0 for SVG, which has none); audio: length in seconds and rate in Hz."""

    kind: str
    format: str
    width: int = 0
    height: int = 0
    channels: int = 0
    seconds: float = 0.0
    rate: int = 0


def sniff(head: bytes) -> tuple[str, str]:
    """(kind, format) from the first 4 KiB of a file: kind is image, audio, video or "" when it is none of ours."""
    if head.startswith(b"\x89PNG"):
        return "image", "png"
    if head.startswith(b"\xff\xd8\xff"):
        return "image", "jpeg"
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "image", "webp"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "image", "gif"
    if head.startswith((b"II*\0", b"MM\0*")):
        return "image", "tiff"
    if head.startswith(b"BM") and head[6:10] == b"\0\0\0\0":
        return "image", "bmp"
    if head.startswith((b"RIFF", b"RF64")) and head[8:12] == b"WAVE":
        return "audio", "wav"
    if head.startswith(b"OggS"):
        return "audio", "ogg"
    if head.startswith(b"fLaC"):
        return "audio", "flac"
    if head.startswith(b"ID3") or (len(head) > 2 and head[0] == 0xFF and head[1] & 0xE6 == 0xE2):
        return "audio", "mp3"
    if head[4:8] == b"ftyp" or head.startswith((b"\x1aE\xdf\xa3", b"RIFF")):
        return "video", "video"
    if _SVG.search(head[:4096]) and head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        return "image", "svg"
    return "", ""


def read_header(data: bytes, wanted: str) -> Header:
    """The header of `data`, which should be a `wanted` (image, audio).

    Raises RefuseError: unreadable_image, unreadable_audio, empty_sound, wrong_kind, too_many_pixels, unsupported_kind.
    """
    unreadable = "unreadable_image" if wanted == "image" else "unreadable_audio"
    if not data:
        raise RefuseError(unreadable, "an empty file")
    kind, form = sniff(data[:4096])
    if kind == "video":
        raise RefuseError("unsupported_kind", "a video; wanted pictures and sounds")
    if not kind:
        raise RefuseError(unreadable, "no format that is read: png jpeg webp gif bmp tiff svg, wav ogg flac mp3")
    if kind != wanted:
        raise RefuseError("wrong_kind", f"{form} where {wanted} is wanted")
    if form == "svg":
        return Header("image", "svg", channels=3)
    return _image(data, form) if kind == "image" else _audio(data, form)


def _image(data: bytes, form: str) -> Header:
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the limit of pixels is the feature stage's, which refuses before decoding
            with Image.open(io.BytesIO(data), formats=_PILLOW) as picture:
                width, height = picture.size
                channels = 1 if picture.mode in ("1", "L", "LA", "I", "I;16", "F") else 3
    except Image.DecompressionBombError as error:
        raise RefuseError("too_many_pixels", str(error)[:120]) from None
    except Exception as error:  # Pillow's plugins raise nearly anything on rubbish
        raise RefuseError("unreadable_image", f"{form} with a broken header ({type(error).__name__})") from None
    return Header("image", form, width=width, height=height, channels=channels)


def _audio(data: bytes, form: str) -> Header:
    import soundfile

    try:
        with soundfile.SoundFile(io.BytesIO(data)) as sound:
            frames, rate, channels = sound.frames, sound.samplerate, sound.channels
    except Exception as error:  # libsndfile's message is of use, its type is not
        raise RefuseError("unreadable_audio", f"{form}: {str(error).rsplit(': ', 1)[-1][:100]}") from None
    if frames <= 0 or rate <= 0:
        raise RefuseError("empty_sound", f"{form} of zero length")
    return Header("audio", form, channels=channels, seconds=frames / rate, rate=rate)
