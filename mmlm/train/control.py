"""Where and how long a training runs (`Where`), and the wish to stop it early (`Stop`)."""

from __future__ import annotations

import math
import os
import re
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from mmlm.errors import ConfigError

START_SECONDS = 15.0
"""Kept free before a time limit beside step and save: ranks leave, the last figures are sent."""
FIRST_SAVE = 20.0
"""Assumed length of a save, seconds, at least, until one was measured."""
SAVE_RATE = 50e6
"""Assumed rate of a save, bytes/s, until one was measured: gathering, hashing and writing 689 MB took 10 s on a busy CPU with
a disk of its own, and a shared disk may be slower."""
LOOK_EVERY = 1.0
"""Seconds between two looks for the stop file."""
_DURATION = re.compile(r"(?:(?P<d>\d+)-)?(?:(?:(?P<h>\d+):)?(?P<m>\d+):)?(?P<s>\d+(?:\.\d+)?)$")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def seconds_of(text: str, name: str = "the time limit") -> float:
    """Seconds of a duration: `3:59:00`, `1-12:00:00`, `59:30`, `90` (seconds), `90s`, `45m`, `4h`, `2d`.

    Raises ConfigError, which says `name`.
    """
    text = text.strip().lower()
    if text[-1:] in _UNITS and re.fullmatch(r"\d+(\.\d+)?", text[:-1]):
        return float(text[:-1]) * _UNITS[text[-1]]
    found = _DURATION.fullmatch(text)
    if not found:
        raise ConfigError(f"{name} {text!r}", wanted="a duration such as 3:59:00, 1-12:00:00, 45m or 4h")
    parts = {unit: float(value or 0) for unit, value in found.groupdict().items()}
    return sum(parts[unit] * factor for unit, factor in _UNITS.items())


def number_of(name: str, default: float = 0.0, *, positive: bool = False) -> float:
    """A number out of the environment. Raises ConfigError when it is none, or below 0 (with `positive` 0 itself)."""
    told = os.environ.get(name)
    if not told:
        return default
    try:
        number = float(told)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or number < 0 or (positive and not number):
        raise ConfigError(f"{name} is {told!r}", wanted="a number above 0" if positive else "a number of at least 0")
    return number


@dataclass(frozen=True)
class Where:
    """Arguments of a run that change nothing of what comes out; they travel to the ranks beside the config."""

    deadline: float | None = None
    """When this process must have ended, seconds since 1970."""
    hang_seconds: float = 1800.0
    """A step that takes longer than this is a hang; 0 turns the watchdog off."""
    ledger: bool = False
    """Write the ids of every step's records into `ledger/`."""
    stop_file: str | None = None
    """When this file appears, stop: the notice of a spot machine, or of a person."""
    resume: bool = False
    """It is an error when there is no checkpoint to go on from."""

    @classmethod
    def from_environment(cls) -> Where:
        """What the command's flags, the user's environment and Slurm say (`SLURM_JOB_END_TIME`).

        Raises ConfigError for a variable that is no number.
        """
        env = os.environ
        ends = [number_of(name) for name in ("MMLM_DEADLINE", "SLURM_JOB_END_TIME") if env.get(name)]
        return cls(
            deadline=min(ends) if ends else None,
            hang_seconds=number_of("MMLM_HANG_SECONDS", cls.hang_seconds),
            ledger=env.get("MMLM_LEDGER", "") not in ("", "0"),
            stop_file=env.get("MMLM_STOP_FILE") or None,
            resume=env.get("MMLM_RESUME", "") not in ("", "0"),
        )

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def first_save(size: float) -> float:
    """Seconds to assume for a checkpoint of `size` bytes while none was measured."""
    return max(FIRST_SAVE, size / SAVE_RATE)


class Stop:
    """Whether this rank was asked to end: by SIGTERM, SIGINT or SIGUSR1, by a time limit, or by a file.

    Handlers are set while it is entered, and put back afterwards; only the main thread may have them.
    """

    def __init__(self, where: Where) -> None:
        self.where, self.reason = where, ""
        self.asked = False
        """Whether somebody asked, by a signal or a file. A time limit that is near is nobody's wish: what is over in time
        has kept it."""
        self._looked = 0.0
        self._before: dict[int, Any] = {}
        # the second one is this process's own: by it Ray's driver forwards a stop (launch/ray_train.py)
        self._files = [file for file in (where.stop_file, os.environ.get("MMLM_STOP_FILE")) if file]

    def __enter__(self) -> Stop:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            try:
                self._before[number] = signal.signal(number, self._ask)
            except ValueError:  # not the main thread, as on Ray: whoever owns the process forwards the wish as a file
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked, self.reason = True, self.reason or signal.Signals(number).name

    @property
    def why(self) -> str:
        """` (SIGTERM)`, or nothing where another rank was asked."""
        return f" ({self.reason})" if self.reason else ""

    def wanted(self, step_seconds: float, save_seconds: float, look_seconds: float = 0.0) -> bool:
        """Asked before a step: whether to save now, since after one more step it might be too late. `look_seconds`: of the
        looks at the validation split that are due on the way."""
        now = time.time()
        if not self.reason and self.where.deadline is not None:
            needed = step_seconds + look_seconds + 1.5 * save_seconds + START_SECONDS
            if now + needed > self.where.deadline:
                self.reason = "its time is over"
        if not self.reason and now - self._looked > LOOK_EVERY:
            self._looked = now
            self.reason = next((f"{file} is there" for file in self._files if Path(file).exists()), "")
            self.asked |= bool(self.reason)
        return bool(self.reason)
