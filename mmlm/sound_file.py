"""Opening of sound files for libsndfile, which hears nothing of what Python raises: cffi prints it and goes on."""

from __future__ import annotations

import errno
from typing import Any, BinaryIO

import soundfile


def open_sound(file: BinaryIO) -> soundfile.SoundFile:
    """As `SoundFile(file)`, with two things more. Quiet where a damaged header (an AIFF cut off in its chunks) sends the reader
    before the beginning of the file. And a disk that fails is told as that, not as a damaged sound: raises OSError; else
    SoundFileError."""
    heard = _Heard(file)
    try:
        return soundfile.SoundFile(heard)
    except soundfile.SoundFileError:
        if heard.failed is None:
            raise
    raise heard.failed


class _Heard:
    """A file that raises nothing; libsndfile sees by its place, and by what it gets, that something is wrong."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.failed: OSError | None = None
        """Of the disk."""

    def seek(self, offset: int, whence: int = 0) -> int:
        try:
            return self._file.seek(offset, whence)
        except ValueError:  # before the beginning of what lies in memory
            return self._file.tell()
        except OSError as error:
            if error.errno != errno.EINVAL:  # before the beginning of a file
                self.failed = error
            return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        try:
            return int(self._file.readinto(buffer))  # type: ignore[attr-defined]
        except OSError as error:
            self.failed = error
            return 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
