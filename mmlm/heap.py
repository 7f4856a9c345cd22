"""Memory that was freed and is wanted again a moment later: keep it, instead of giving it back to the kernel each time.

Given back and asked for again, each page is cleared and mapped anew, and no cache knows it any more.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Numbers of glibc's malloc.h."""
LARGE = 32 << 20
"""From so many bytes on (glibc takes no more), memory is still the kernel's business, and goes back at once."""
ALL = -1
"""Bytes to keep: all that are freed."""


@functools.cache
def keep_freed_memory(most: int) -> None:
    """Tell glibc's malloc, once in a process, to keep up to `most` freed bytes at the end of the heap; nothing on another
    libc."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_THRESHOLD, LARGE)
        mallopt(_TRIM_THRESHOLD, most)
