"""Opening of sound files for libsndfile."""

from __future__ import annotations

import errno
from typing import Any, BinaryIO

import soundfile


def open_sound(file: BinaryIO) -> soundfile.SoundFile:
    """As `SoundFile(file)`, quiet where a damaged header (an AIFF cut off in its chunks) sends the reader before the beginning
    of the file: what Python raises there would be printed from within the library and change nothing. Raises
    SoundFileError."""
    return soundfile.SoundFile(_Forgiving(file))


class _Forgiving:
    """A file that stays where it is when it is asked to go where nothing is; libsndfile sees that by its place."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def seek(self, offset: int, whence: int = 0) -> int:
        try:
            return self._file.seek(offset, whence)
        except ValueError:  # of what lies in memory
            return self._file.tell()
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return self._file.tell()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
