"""Named places at which a run can be held, so that a fault strikes exactly there. Off unless the environment asks.

    MMLM_FAULTPOINT="mid_tar:3=/some/folder" mmlm shard …

The third arrival at `mid_tar`, counted over all processes of the run, writes `reached-<pid>-3` into the folder and
waits until a file `go` is there; then it writes `passed-<pid>-3` and goes on. Every arrival leaves `arrived-<n>`.

Why a test aid stands in the product: what is promised is that a kill *anywhere* loses nothing, and the interesting
places lie between two system calls of another process, often a Ray worker. From outside they are hit only by luck and
sleeping; a patched function would have to be smuggled into every worker and would no longer be the code that ships.
So the code names five of its places, at the cost of one look into the environment for each unit of work.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

VARIABLE = "MMLM_FAULTPOINT"
POINTS = ("before_temporary", "mid_tar", "after_fsync", "after_publish", "before_manifest")
"""In the order in which a unit passes them: before its temporary file is opened; when half of its records are written;
tar and index flushed, the worker about to return; linked under their names, the journal not yet told; and, once for all
units, everything in the journal and `manifest.parquet` not yet written. The first three are passed where the unit is
written, the last two in the committer."""
_LOOK_SECONDS = 0.01


def point(name: str) -> None:
    """Wait here if this is the wanted arrival at the point `name`; else, and without the variable, do nothing."""
    wanted = os.environ.get(VARIABLE)
    if wanted:
        _arrive(name, wanted)


def _arrive(name: str, wanted: str) -> None:
    place, _, folder = wanted.partition("=")
    place, _, nth = place.partition(":")
    if place != name:
        return
    n = 1
    while True:
        try:  # whoever makes the file is the n-th, whichever process or machine it is
            os.close(os.open(f"{folder}/arrived-{n}", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            break
        except FileExistsError:
            n += 1
    if n != int(nth or 1):
        return
    (Path(folder) / f"reached-{os.getpid()}-{n}").touch()
    while not (Path(folder) / "go").exists():
        time.sleep(_LOOK_SECONDS)
    (Path(folder) / f"passed-{os.getpid()}-{n}").touch()
