"""A small process beside a Ray session that ends what the session leaves behind, whatever becomes of the driver.

Ray's own agents outlive a killed driver by more than a minute. The reaper waits until its standard input closes, which
the kernel sees to when the driver ends in any way, then kills every process whose environment carries the session's tag
and removes the session's folder. It runs in a session of its own, so that a signal to the driver's group does not reach
it, and imports nothing but the standard library: `python -I -S reaper.py TAG FOLDER`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

TAG = "MMLM_RAY_SESSION"
"""Environment variable that marks all processes of one session."""
PATIENCE = 15.0
"""Seconds after which the reaper gives up on a process that does not die."""


def start(tag: str, folder: Path) -> subprocess.Popen[bytes]:
    """A reaper for the session `tag`; it goes to work when its stdin is closed."""
    return subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, tag, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def finish(reaper: subprocess.Popen[bytes]) -> None:
    """Let the reaper do its work, and wait for it."""
    assert reaper.stdin
    reaper.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        reaper.wait(PATIENCE + 5)


def tagged(tag: str) -> list[int]:
    """Ids of the running processes that were started with TAG=`tag`; none where there is no /proc."""
    wanted = f"{TAG}={tag}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is not ours
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def titled(folder: str) -> list[int]:
    """Ids of the running processes called `ray::…` that have a file below `folder` open.

    Ray's agents and workers write their title over the start of their environment, and the tag with it where it stands
    there: such a process is known by its logs.
    """
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (entry / "cmdline").read_bytes().startswith(b"ray::") and any(
                os.readlink(file).startswith(f"{folder}/") for file in (entry / "fd").iterdir()
            ):
                found.append(int(entry.name))
    return found


def reap(tag: str, folder: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while (left := {*tagged(tag), *titled(folder)}) and time.monotonic() < deadline:
        for process in left:
            with contextlib.suppress(OSError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.05)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.stdin.buffer.read()
    reap(*sys.argv[1:3])
