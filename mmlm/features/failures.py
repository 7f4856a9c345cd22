"""Typed failures of one sample: it is counted and set aside with its reason, and the work goes on."""

from __future__ import annotations

from mmlm.errors import DataError

REASONS = (
    "missing_file",  # there is no such file, or it is no regular file
    "changed",  # the file is not the one that was scanned
    "too_large",  # more bytes than a single file may have
    "unreadable_image",
    "unreadable_audio",
    "unreadable_video",
    "bomb",  # the header announces more pixels or samples than we decode
    "unsafe_svg",  # the SVG refers to files, or unfolds without bound
    "unsupported",  # a kind or format that we do not take
    "empty_sound",
    "empty",  # neither a question nor anything else to read
    "no_answer",
    "too_long",
)


class SampleError(DataError):
    """Why one record cannot become a sample. `reason` is one of REASONS."""

    def __init__(self, reason: str, found: str, *, wanted: str = "", cure: str = "") -> None:
        if reason not in REASONS:
            raise ValueError(f"unknown reason {reason!r}")
        self.reason = reason
        super().__init__(found, wanted=wanted, cure=cure)

    def __reduce__(self) -> tuple[object, ...]:  # crosses process borders (Ray) whole
        return (_rebuild, (self.reason, self.found, self.wanted, self.cure))


def _rebuild(reason: str, found: str, wanted: str, cure: str) -> SampleError:
    return SampleError(reason, found, wanted=wanted, cure=cure)
