"""Sounds whose headers lie, that break off, or that are none: file name → (bytes, what becomes of it)."""

from __future__ import annotations

import functools
import io
import struct
import zipfile

import numpy as np
import soundfile

from tests.hostile.pictures import Cases, encode, flip


def sound(form: str, subtype: str | None = None, seconds: float = 0.3, rate: int = 8000, channels: int = 1) -> bytes:
    """A tone with noise."""
    t = np.arange(int(seconds * rate)) / rate
    wave = 0.3 * np.sin(2 * np.pi * 440 * t) + 0.05 * np.random.default_rng(0).standard_normal(len(t))
    held = io.BytesIO()
    soundfile.write(held, np.stack([wave] * channels, axis=-1), rate, format=form, subtype=subtype)
    return held.getvalue()


def wav(
    *, rate: int = 8000, channels: int = 1, bits: int = 16, tag: int = 1, data: bytes = b"\1\2" * 800,
    size: int | None = None, before: bytes = b"", block: int | None = None,
) -> bytes:  # fmt: skip
    """A WAV of which every figure may lie; `size` is what the data chunk says of itself."""
    block = channels * bits // 8 if block is None else block
    format_ = struct.pack("<HHIIHH", tag, channels, rate, (rate * block) & 0xFFFFFFFF, block & 0xFFFF, bits)
    body = b"WAVE" + before + b"fmt " + struct.pack("<I", 16) + format_
    body += b"data" + struct.pack("<I", len(data) if size is None else size) + data
    return b"RIFF" + struct.pack("<I", len(body) & 0xFFFFFFFF) + body


def flac(*, rate: int = 8000, channels: int = 1, samples: int = 2400, data: bytes | None = None) -> bytes:
    """A FLAC with another STREAMINFO than its frames have."""
    real = sound("FLAC")
    packed = (rate << 44) | ((channels - 1) << 41) | (15 << 36) | samples
    head = real[:18] + struct.pack(">Q", packed)
    return head + (real[26:] if data is None else real[26:42] + data)


@functools.cache
def sound_cases() -> Cases:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(20 << 20))
    ogg, mp3 = sound("OGG", "VORBIS"), sound("MP3", "MPEG_LAYER_III")
    page = ogg[:28]
    not_numbers = np.full(800, np.nan, "<f4").tobytes()
    return {
        "empty.wav": (b"", "refused unreadable_audio"),
        "riff_only.wav": (b"RIFF\0\0\0\0WAVE", "refused unreadable_audio"),
        "says_four_gigabytes.wav": (wav(size=2**32 - 1), "kept"),  # what is there is read
        "says_more_than_there_is.wav": (wav(size=2**31 - 2), "kept"),
        "rate_zero.wav": (wav(rate=0), "refused unreadable_audio"),
        "rate_of_four_gigahertz.wav": (wav(rate=2**31 - 1), "quarantine bomb"),
        "rate_of_one_hertz.wav": (wav(rate=1), "quarantine bomb"),
        "no_channel.wav": (wav(channels=0), "refused unreadable_audio"),
        "sixty_thousand_channels.wav": (wav(channels=60_000), "refused unreadable_audio"),
        "a_thousand_channels_of_nothing.wav": (wav(channels=1000, data=bytes(2000 * 3), rate=384_000), "kept"),
        "no_bits.wav": (wav(bits=0), "refused unreadable_audio"),
        "bits_of_another_world.wav": (wav(bits=61), "refused unreadable_audio"),
        "unknown_coding.wav": (wav(tag=0xBEEF), "refused unreadable_audio"),
        "not_numbers.wav": (wav(tag=3, bits=32, data=not_numbers), "quarantine unreadable_audio"),
        "endless_numbers.wav": (
            wav(tag=3, bits=32, data=np.full(800, np.inf, "<f4").tobytes()), "quarantine unreadable_audio",
        ),
        "no_sample.wav": (wav(data=b""), "refused empty_sound"),
        "no_data_chunk.wav": (wav()[:36], "refused unreadable_audio"),
        "chunk_of_four_gigabytes.wav": (
            wav(before=b"LIST" + struct.pack("<I", 2**32 - 1) + b"INFO"), "refused unreadable_audio",
        ),
        "rf64_of_exabytes.wav": (
            b"RF64\xff\xff\xff\xffWAVEds64" + struct.pack("<IQQQI", 28, 2**62, 2**62, 2**62, 0) + wav()[12:],
            "kept",
        ),
        "au_inside.wav": (sound("AU"), "refused unreadable_audio"),
        "aiff_inside.wav": (sound("AIFF"), "kept"),
        "truncated.aiff": (sound("AIFF")[:40], "refused unreadable_audio"),
        "magic_only.aiff": (b"FORM\0\0\0\0AIFF", "refused unreadable_audio"),
        "archive.wav": (held.getvalue(), "refused unreadable_audio"),
        "picture.wav": (encode("PNG"), "refused wrong_kind"),
        "sound.png": (wav(), "refused wrong_kind"),
        "film.wav": (b"\0\0\0\x18ftypmp42" + bytes(64), "refused unsupported_kind"),
        "truncated.flac": (sound("FLAC")[:60], "refused unreadable_audio"),
        "says_68_billion_samples.flac": (flac(samples=2**36 - 1), "quarantine unreadable_audio"),
        "rate_of_one_hertz.flac": (flac(rate=1), "quarantine bomb"),
        "only_a_header.flac": (flac(data=b""), "quarantine unreadable_audio"),
        "bit_flipped.flac": (flip(sound("FLAC"), 900), "quarantine unreadable_audio"),
        "magic_only.flac": (b"fLaC", "refused unreadable_audio"),
        "block_of_16_megabytes.flac": (b"fLaC\x00\xff\xff\xff" + bytes(64), "refused unreadable_audio"),
        "first_page_only.ogg": (page, "refused unreadable_audio"),
        "truncated.ogg": (ogg[:3500], "refused empty_sound"),
        "bit_flipped_head.ogg": (flip(ogg, 40), "refused unreadable_audio"),
        "position_lies.ogg": (_last_position(ogg, 2**62), "kept"),
        "endless_lacing.ogg": (b"OggS\0\2" + bytes(20) + b"\xff" * 256, "refused unreadable_audio"),
        "opus_head_only.ogg": (b"OggS\0\2" + bytes(20) + b"\x01\x13OpusHead\1\1" + bytes(9), "refused unreadable_audio"),
        "tag_of_256_megabytes.mp3": (b"ID3\x04\0\0\x7f\x7f\x7f\x7f" + mp3, "refused unreadable_audio"),
        "sync_words_only.mp3": (b"\xff\xfb" * 400, "refused unreadable_audio"),
        "one_frame_head.mp3": (mp3[:4], "refused unreadable_audio"),
    }  # fmt: skip


def _last_position(ogg: bytes, position: int) -> bytes:
    """The file with another sample position in its last page (and that page's checksum made right)."""
    at = ogg.rindex(b"OggS")
    page = bytearray(ogg[at:])
    page[6:14] = struct.pack("<q", position)
    page[22:26] = bytes(4)
    page[22:26] = struct.pack("<I", _ogg_sum(bytes(page)))
    return ogg[:at] + bytes(page)


def _ogg_sum(page: bytes) -> int:
    """CRC-32 of an Ogg page (polynomial 0x04c11db7, nothing reflected, start 0)."""
    total = 0
    for byte in page:
        total ^= byte << 24
        for _ in range(8):
            total = ((total << 1) ^ (0x04C11DB7 if total & 0x80000000 else 0)) & 0xFFFFFFFF
    return total
