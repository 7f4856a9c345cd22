"""One local rank: `python -m mmlm.launch.rank package.module:function args.json log-folder`.

Dies with its parent, stops on a signal before the target has its own handlers, and leaves what went wrong in
`log/rank-N.error.json` as {kind, found, wanted, cure}.
"""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import importlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent() -> None:
    """Ask the kernel for SIGKILL when the parent ends, and end at once if it has ended already."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = os.environ.get("MMLM_PARENT")
    if parent and os.getppid() != int(parent):
        os._exit(1)


def stop_early(number: int, frame: FrameType | None) -> None:
    """A stop before training began: there is nothing to save."""
    os._exit(4)


def resolve(target: str) -> Callable[..., Any]:
    """ "package.module:function" → the function."""
    module, _, name = target.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


LOST = (
    "closed by peer",
    "reset by peer",
    "Broken pipe",
    "Connection refused",
    "remote process exited",
    "NCCL communicator was aborted",
)
"""What gloo and NCCL say when the process at the other end is gone."""


def call(target: str, args: dict[str, Any]) -> None:
    """`target` with `args` in this process, one of several whose launcher is not ours. Raises RankLost when another one is
    gone, which is that one's fault."""
    from mmlm.errors import RankLost

    try:
        resolve(target)(**args)
    except RuntimeError as error:
        words = str(error)
        if not (("gloo" in words or "NCCL" in words or "nccl" in words) and any(said in words for said in LOST)):
            raise
        cure = "see what that one said; the same command goes on from the last checkpoint"
        raise RankLost("the connection to another rank is lost", cure=cure) from error


def rebuild(said: dict[str, Any]) -> Exception:
    """The inverse of `describe`: the same class of MmlmError with the same words (its nearest one where it is gone)."""
    from mmlm.errors import LaunchError, MmlmError

    try:
        kind = resolve(said["kind"])
        if not (isinstance(kind, type) and issubclass(kind, MmlmError)):
            kind = LaunchError
    except (ImportError, AttributeError, ValueError):
        kind = LaunchError
    error: Exception
    try:
        error = kind(said["found"], wanted=said["wanted"], cure=said["cure"])
    except TypeError:  # a subclass with a constructor of its own: its words under the class it derives from
        base = next(c for c in kind.__mro__[1:] if c.__module__ == MmlmError.__module__)
        error = base(said["found"], wanted=said["wanted"], cure=said["cure"])
    return error


def describe(error: BaseException) -> dict[str, Any]:
    """An error as plain JSON; what is not an MmlmError is a crash, whose last words are kept."""
    from mmlm.errors import MmlmError, explain_os_error

    if isinstance(error, OSError):
        error = explain_os_error(error) or error
    if isinstance(error, MmlmError):
        kind = f"{type(error).__module__}:{type(error).__qualname__}"
        return {"kind": kind, "found": error.found, "wanted": error.wanted, "cure": error.cure, "exit": error.exit_code}
    said = "".join(traceback.format_exception_only(error)).strip()
    return {"kind": "crash", "found": said[-600:], "wanted": "", "cure": "", "exit": 1}


def leave_group() -> None:
    """End the process group in an orderly way: ranks that exit with it open abort now and then (gloo's threads)."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def show_progress() -> None:
    """Progress lines go to the terminal that the parent passed on (rank 0); the other ranks keep theirs in the log."""
    from mmlm.progress import Progress

    Progress.quiet = bool(os.environ.get("MMLM_QUIET"))
    terminal = os.environ.pop("MMLM_PROGRESS_FD", None)
    if terminal is not None:
        os.set_inheritable(int(terminal), False)
        Progress.terminal_stream = os.fdopen(int(terminal), "w", encoding="utf-8", errors="replace")


def main(target: str, args: str, log: str) -> int:
    from mmlm.storage import write_json

    try:
        show_progress()
        resolve(target)(**json.loads(Path(args).read_text(encoding="utf-8")))
        leave_group()
        return 0
    except KeyboardInterrupt:
        return 4
    except Exception as error:
        traceback.print_exc()
        said = describe(error)
        write_json(Path(log) / f"rank-{os.environ.get('RANK', '0')}.error.json", said)
        return int(said["exit"])


if __name__ == "__main__":
    faulthandler.enable()  # a crash in native code leaves the stack of every thread in the log
    die_with_parent()
    for stop in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(stop, stop_early)
    from mmlm.leaving import leave

    code = main(*sys.argv[1:4])
    if code == 0:  # a rank that failed must not wait for peers that are gone
        atexit._run_exitfuncs()  # what libraries have left to write
    leave(code)
