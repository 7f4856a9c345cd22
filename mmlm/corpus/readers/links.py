"""What lies in a folder, with links to other folders followed as far as that is safe."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from mmlm.corpus.drafts import Refusal

Trail = tuple[str, ...]
"""Real paths of the folders that a walk came through, the one that it is in last."""
Bad = Callable[[Refusal], None]
"""Told of every link that is not followed, by its path relative to the folder that is walked."""
MOST_LINKS = 3
"""Links to folders that may lie within one another; folders that link to one another would have paths without end."""
_LEFTOVERS = {"thumbs.db", "desktop.ini", "__macosx", "icon\r", "ehthumbs.db"}


def is_left_over(name: str) -> bool:
    """Whether it is hidden, or something that systems leave behind."""
    return name.startswith(".") or name.lower() in _LEFTOVERS


class Links:
    """The entries of folders below `folder`.

    A link to a file counts as that file. A link to a folder counts as that folder where it lies in `within` (`folder`
    itself when absent). A link to a folder that holds the link is passed over: all that it leads to is there already.
    Links that lead elsewhere or nowhere are given to `bad`.
    """

    def __init__(self, folder: Path, within: Path | None = None, bad: Bad | None = None) -> None:
        self.folder, self.bad = folder, bad
        self.trail: Trail = (os.path.realpath(folder),)
        self.within = os.path.realpath(within) if within else self.trail[0]

    def entries(self, relative: str, trail: Trail) -> list[tuple[str, Trail | None]]:
        """(name, for a folder the trail that ends in it) of the files and folders in folder `relative`, by name."""
        with os.scandir(self.folder / relative) as found:
            entries = sorted((e for e in found if not is_left_over(e.name)), key=lambda e: e.name)
        kept: list[tuple[str, Trail | None]] = []
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                kept.append((entry.name, (*trail, os.path.join(trail[-1], entry.name))))
            elif entry.is_file(follow_symlinks=False) or (entry.is_symlink() and os.path.isfile(entry.path)):
                kept.append((entry.name, None))
            elif entry.is_symlink():
                inner = self._followed(f"{relative}/{entry.name}".lstrip("/"), entry, trail)
                kept += [(entry.name, inner)] if inner else []
        return kept

    def _followed(self, relative: str, entry: os.DirEntry[str], trail: Trail) -> Trail | None:
        """The trail into the folder that a link leads to; None where it is not followed."""
        real, told = os.path.realpath(entry.path), os.readlink(entry.path)
        if not os.path.isdir(entry.path):
            leads = "to what is neither a file nor a folder" if os.path.exists(real) else "nowhere"
            self._tell(relative, "missing_file", f"a link that leads {leads}: {told}")
        elif not _lies_in(real, self.within):
            self._tell(relative, "unsafe_path", f"a link to a folder outside the data folder: {told}")
        elif sum(os.path.dirname(b) != a for a, b in pairwise(trail)) >= MOST_LINKS:
            self._tell(relative, "unsafe_path", f"a link below {MOST_LINKS} other links to folders: {told}")
        elif not any(_lies_in(one, real) for one in trail):
            return (*trail, real)
        return None

    def _tell(self, relative: str, reason: str, detail: str) -> None:
        if self.bad:
            self.bad(Refusal(relative, relative, reason, detail))


def _lies_in(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")
