"""How a process of ours ends: without taking the interpreter apart under native threads.

A thread of pyarrow's, gloo's or autograd's that asks for the interpreter while it is being taken apart is unwound through
code that forbids it, and the whole process aborts ("terminate called without an active exception", exit -6) with its work
done. It is rare, and more likely on a busy machine.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
from collections.abc import Callable
from typing import NoReturn


def leave(code: int) -> NoReturn:
    """End this process at once: what libraries have left to write is lost, what was printed is not."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # nobody reads any more, or it is closed
            stream.flush()
    os._exit(code)


def leave_in_order(code: int) -> NoReturn:
    """End this process as the interpreter would: threads that are no daemons are waited for, exit functions run."""
    threading._shutdown()  # type: ignore[attr-defined]  # it also lets pools of threads end, which register there
    atexit._run_exitfuncs()
    leave(code)


def run(main: Callable[[], int | None]) -> NoReturn:
    """`sys.exit(main())`, ended in order. What `main` lets through is shown as ever."""
    try:
        code = main()
    except SystemExit as error:  # argparse's
        code = error.code if isinstance(error.code, int | None) else 1
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except KeyboardInterrupt:  # before the command had begun to look out for it
        print("mmlm: interrupted; run the same command again to go on", file=sys.stderr)
        code = 4
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        code = 1
    leave_in_order(code or 0)
