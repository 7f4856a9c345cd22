"""What media are, from their headers; and that rubbish is refused with the right word."""

from __future__ import annotations

import errno
import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from mmlm.corpus.drafts import RefuseError
from mmlm.corpus.sniff import read_header, sniff
from tests.corpus.samples import png, wav


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_pictures(form: str, mode: str) -> None:
    held = io.BytesIO()
    Image.new(mode, (12, 7), 9).save(held, form)
    header = read_header(held.getvalue(), "image")
    assert (header.kind, header.format, header.width, header.height) == ("image", form.lower(), 12, 7)


@pytest.mark.parametrize(
    ("form", "name"), [("WAV", "wav"), ("OGG", "ogg"), ("FLAC", "flac"), ("MP3", "mp3"), ("AIFF", "aiff")]
)
def test_sounds(form: str, name: str) -> None:
    held = io.BytesIO()
    soundfile.write(held, np.sin(np.arange(8000) / 9), 16000, format=form)
    header = read_header(held.getvalue(), "audio")
    assert (header.format, header.rate) == (name, 16000)
    assert header.seconds == pytest.approx(0.5, abs=0.15)


def test_a_sound_cut_off_in_its_header_is_refused_without_a_word(capfd: pytest.CaptureFixture[str]) -> None:
    """libsndfile goes before the beginning of the file then, and cffi would print what Python says to that."""
    held = io.BytesIO()
    soundfile.write(held, np.zeros(800), 16000, format="AIFF")
    with pytest.raises(RefuseError, match="unreadable_audio"):
        read_header(held.getvalue()[:40], "audio")
    assert capfd.readouterr().err == ""


class FailingDisk(io.BytesIO):
    """Its first 4,096 bytes can be read."""

    def readinto(self, buffer: Any) -> int:
        if self.tell() + len(buffer) > 4096:
            raise OSError(errno.EIO, "Input/output error")
        return super().readinto(buffer)


def test_a_disk_that_fails_is_no_damaged_sound() -> None:
    held = io.BytesIO()
    soundfile.write(held, np.sin(np.arange(80_000) / 9), 16000, format="OGG")
    assert read_header(io.BytesIO(held.getvalue()), "audio").format == "ogg"
    with pytest.raises(OSError, match="Input/output error"):
        read_header(FailingDisk(held.getvalue()), "audio")


@pytest.mark.parametrize(
    "data",
    [
        b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        b'<?xml version="1.0"?>\n<!-- a b -->\n<svg width="3">',
        b"\xef\xbb\xbf<!DOCTYPE svg PUBLIC>",
        b"<svg:svg xmlns:svg='x'>",
    ],
)
def test_svg(data: bytes) -> None:
    assert sniff(data) == ("image", "svg")


@pytest.mark.parametrize(
    ("data", "kind", "reason"),
    [
        (b"", "image", "unreadable_image"),
        (b"not a picture", "image", "unreadable_image"),
        (b"\x89PNG broken", "image", "unreadable_image"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 40, "image", "unreadable_image"),
        (b"\xff\xd8\xff\xe0rubbish", "image", "unreadable_image"),
        (b"", "audio", "unreadable_audio"),
        (b"RIFF\0\0\0\0WAVEjunk", "audio", "unreadable_audio"),
        (b"OggS" + b"\0" * 60, "audio", "unreadable_audio"),
        (wav(1, 0), "audio", "empty_sound"),
        (wav(1), "image", "wrong_kind"),
        (png(1), "audio", "wrong_kind"),
        (b"\0\0\0 ftypisom", "image", "unsupported_kind"),
        (b"%PDF-1.4", "image", "unreadable_image"),
        (b"<html><svg></svg></html>"[:6], "image", "unreadable_image"),
    ],
)
def test_refusals(data: bytes, kind: str, reason: str) -> None:
    with pytest.raises(RefuseError) as error:
        read_header(data, kind)
    assert error.value.reason == reason


def test_a_picture_of_too_many_pixels_is_refused_by_its_header() -> None:
    small = png(1)
    head = b"IHDR" + struct.pack(">II", 20_000, 20_000) + small[24:29]
    bomb = small[:12] + head + struct.pack(">I", zlib.crc32(head)) + small[33:]
    with pytest.raises(RefuseError) as error:
        read_header(bomb, "image")
    assert error.value.reason == "too_many_pixels"
