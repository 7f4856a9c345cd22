"""One drawn hierarchy of errors. A message says what was found, what was wanted, and what to do.

Exit codes: 0 done, 1 our fault (anything that is not an MmlmError), 2 wrong input, 3 failed gate,
4 interrupted or lost, and the same command goes on.
"""

from __future__ import annotations

import errno


class MmlmError(Exception):
    """Something a person can mend. `found` is what is wrong, `wanted` what was expected, `cure` what to do."""

    exit_code = 2

    def __init__(self, found: str, *, wanted: str = "", cure: str = "") -> None:
        self.found, self.wanted, self.cure = found, wanted, cure
        parts = [_sentence(found)]
        if wanted:
            parts.append(f"wanted {_sentence(wanted)}")
        if cure:
            parts.append(_sentence(cure))
        super().__init__("; ".join(parts))

    def __reduce__(self) -> tuple[object, ...]:  # crosses process borders (Ray) whole
        return (_rebuild, (type(self), self.found, self.wanted, self.cure))


def _sentence(text: str) -> str:
    """Without its full stop, since parts are joined; a path that ends in one (`.`, `..`) keeps it."""
    return text[:-1] if text.endswith(".") and text[-2:-1].isalnum() else text


def _rebuild(kind: type[MmlmError], found: str, wanted: str, cure: str) -> MmlmError:
    return kind(found, wanted=wanted, cure=cure)


class ConfigError(MmlmError):
    """A story, a config file or an override is wrong."""


class DataError(MmlmError):
    """A corpus, a record, a picture or a sound is wrong."""


class TooLargeError(DataError):
    """A file or object has more bytes than the caller takes."""


class ArtifactError(MmlmError):
    """A noun at rest (manifest, shards, checkpoint, report) is missing, broken, newer, or another one."""


class LaunchError(MmlmError):
    """A cluster, a tracking server, a rank or this machine does not do what was asked."""


class Interrupted(MmlmError):
    """A signal stopped the work after it was saved; running the same command again continues it."""

    exit_code = 4


class WorkLost(LaunchError):
    """A rank, a worker or a step was lost on the way (killed, or hung); running the same command again continues it."""

    exit_code = Interrupted.exit_code


class RankLost(LaunchError):
    """Another rank is gone, nobody here knows why: if it failed, the same command fails again, so a job is not queued again."""

    exit_code = 1


class ServeError(MmlmError):
    """A request to a served model, or the server itself, is wrong."""


class GateFailed(MmlmError):
    """The champion stays and the caller asked for a promotion."""

    exit_code = 3


def explain_os_error(error: OSError) -> MmlmError | None:
    """The sentence for an operating-system error that a person can mend, or None when it is ours to explain."""
    where = f" at {error.filename}" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return LaunchError(
            f"the disk is full{where}", cure="free some space, then run the same command again: finished work is kept"
        )
    if error.errno in (errno.EIO, errno.ESTALE):
        return LaunchError(
            f"the disk or network drive fails{where} ({error.strerror})",
            cure="look after it (`dmesg` says more), then run the same command again: finished work is kept",
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return LaunchError(f"no permission{where} ({error.strerror})", cure="choose another --out or change its rights")
    if error.errno == errno.EADDRINUSE:
        return LaunchError("the port is already in use", cure="choose another with --port")
    if error.errno in (errno.ENOTDIR, errno.EEXIST) and error.filename:
        return DataError(f"{error.filename} is a file, or lies below one", wanted="a folder", cure="check the path")
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST):
        return DataError(f"{error.strerror}{where}", cure="check the path")
    return None
