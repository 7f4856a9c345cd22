"""What a media file is, from its first bytes and its header alone; nothing is decoded here."""

from __future__ import annotations

import io
import re
import warnings
from dataclasses import dataclass
from typing import BinaryIO

from mmlm.corpus.drafts import RefuseError

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".svg")
AUDIO_ENDINGS = (".wav", ".ogg", ".oga", ".opus", ".flac", ".mp3", ".aif", ".aiff", ".aifc")
VIDEO_ENDINGS = (".mp4", ".m4v", ".webm", ".mkv", ".mov", ".avi")
TEXT_ENDINGS = (".txt", ".md")
_PILLOW = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]
_NO_VIDEO = (b"avi", b"hei", b"hev", b"mif", b"msf", b"M4A", b"M4B")
"""Brands of the MP4 family that are pictures (AVIF, HEIF) or sounds, none of which is read."""
_SVG = re.compile(rb"<svg[\s>]|<!DOCTYPE\s+svg|<[A-Za-z]+:svg[\s>]")


_READ = {"image": "png jpeg webp gif bmp tiff svg", "audio": "wav ogg flac mp3 aiff", "video": "mp4 mov webm mkv avi"}


@dataclass(frozen=True, slots=True)
class Header:
    """`kind` image: width and height in pixels (0 for SVG, which has none); audio: length in seconds and rate in Hz;
    video: its format alone, since the rest takes a decoder."""

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
    if head.startswith(b"FORM") and head[8:12] in (b"AIFF", b"AIFC"):
        return "audio", "aiff"
    if head.startswith(b"OggS"):
        return "audio", "ogg"
    if head.startswith(b"fLaC"):
        return "audio", "flac"
    if head.startswith(b"ID3") or (len(head) > 2 and head[0] == 0xFF and head[1] & 0xE6 == 0xE2):
        return "audio", "mp3"
    if head[4:8] == b"ftyp" and not head[8:12].startswith(_NO_VIDEO):
        return "video", "mov" if head[8:12] == b"qt  " else "mp4"
    if head[4:8] in (b"moov", b"mdat", b"wide") and head[:1] == b"\0":
        return "video", "mov"
    if head.startswith(b"\x1aE\xdf\xa3"):
        return "video", "webm" if b"webm" in head[:64] else "mkv"
    if head.startswith(b"RIFF") and head[8:11] == b"AVI":
        return "video", "avi"
    if _SVG.search(head[:4096]) and head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        return "image", "svg"
    return "", ""


def read_header(data: bytes | BinaryIO, wanted: str) -> Header:
    """The header of `data` (all of a file, or the file opened), which should be a `wanted` (image, audio, video).

    Raises RefuseError: unreadable_image, unreadable_audio, unreadable_video, empty_sound, wrong_kind, too_many_pixels,
    unsupported_kind (a video where something else is wanted).
    """
    unreadable = f"unreadable_{wanted}"
    opened = io.BytesIO(data) if isinstance(data, bytes) else data
    opened.seek(0)
    head = opened.read(4096)
    opened.seek(0)
    if not head:
        raise RefuseError(unreadable, "an empty file")
    kind, form = sniff(head)
    if kind == "video" != wanted:
        raise RefuseError("unsupported_kind", f"a video where {wanted} is wanted")
    if not kind:
        raise RefuseError(unreadable, f"no format that is read: {_READ.get(wanted, '')}")
    if kind != wanted:
        raise RefuseError("wrong_kind", f"{form} where {wanted} is wanted")
    if form == "svg":
        return Header("image", "svg", channels=3)
    if kind == "video":
        return Header("video", form)
    return _image(opened, form) if kind == "image" else _audio(opened, form)


def _image(opened: BinaryIO, form: str) -> Header:
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the limit of pixels is the feature stage's, which refuses before decoding
            with Image.open(opened, formats=_PILLOW) as picture:
                width, height = picture.size
                channels = 1 if picture.mode in ("1", "L", "LA", "I", "I;16", "F") else 3
    except Image.DecompressionBombError as error:
        raise RefuseError("too_many_pixels", str(error)[:120]) from None
    except Exception as error:  # Pillow's plugins raise nearly anything on rubbish
        raise RefuseError("unreadable_image", f"{form} with a broken header ({type(error).__name__})") from None
    return Header("image", form, width=width, height=height, channels=channels)


def _audio(opened: BinaryIO, form: str) -> Header:
    from mmlm.sound_file import open_sound

    try:
        with open_sound(opened) as sound:
            frames, rate, channels = sound.frames, sound.samplerate, sound.channels
    except OSError:
        raise  # the disk's, which says nothing of the sound
    except Exception as error:  # libsndfile's message is of use, its type is not
        raise RefuseError("unreadable_audio", f"{form}: {str(error).rsplit(': ', 1)[-1][:100]}") from None
    if frames <= 0 or rate <= 0:
        raise RefuseError("empty_sound", f"{form} of zero length")
    return Header("audio", form, channels=channels, seconds=frames / rate, rate=rate)
