"""The kill matrix as one table: every fault at every point, what is done there, or why the combination cannot exist.

docs/faults.md is written from it: `python -m tests.faults.cells > docs/faults.md`; a test holds them together. The
tests take their cells from it, so that a cell in the table is a cell that runs.
"""

from __future__ import annotations

from dataclasses import dataclass

from mmlm.shards.faultpoints import POINTS
from tests.faults.corpus import IN_ONE_SHARD, MODALITIES, RECORDS

FAULTS = {
    "worker_killed": "SIGKILL of a worker",
    "driver_killed": "SIGKILL of the driver",
    "node_stopped": "Ray node stopped",
    "disk_full": "ENOSPC",
    "publish_fails": "EIO on publish",
    "zombie_worker": "a zombie worker finishing late",
    "submitted_twice": "the same job submitted twice at once",
}
PLACES = {
    "before_temporary": "before the temporary file",
    "mid_tar": "mid-tar",
    "after_fsync": "after fsync",
    "after_publish": "after publish",
    "before_manifest": "before the manifest row",
}
HERE, ALONE, RAY, CLUSTER = "one process", "Ray, one worker", "Ray, two workers", "two Ray nodes"


@dataclass(frozen=True)
class Cell:
    """What is done in the three cells (one a modality) of a fault at a point, or why they cannot exist."""

    how: str = ""
    where: str = HERE
    cannot: str = ""


_LEFT = (
    "all units are in the journal, so the Ray session was left before this point (a test sees to that): no worker, and "
    "no task on any node, belongs to the job any more"
)
_NOT_YET = (
    "nothing is published before a whole temporary file is on the disk: no publishing call (link, fsync of the folder, "
    "append to the journal, rename) of the unit is made at this point that could fail"
)
TABLE: dict[str, dict[str, Cell]] = {
    "worker_killed": {
        "before_temporary": Cell("the worker that was given the unit is killed; the same run goes on and ends well", RAY),
        "mid_tar": Cell("the worker is killed with half a tar written; another one makes the unit under a new name", RAY),
        "after_fsync": Cell("the worker is killed with the tar flushed and its result not yet sent", RAY),
        "after_publish": Cell("while the committer stands here, every worker is killed, busy or idle", RAY),
        "before_manifest": Cell(cannot=_LEFT),
    },
    "driver_killed": {
        "before_temporary": Cell("the driver is killed while a worker is about to open its file", RAY),
        "mid_tar": Cell("the driver is killed while a worker has half a tar written", RAY),
        "after_fsync": Cell("the driver is killed while a worker is about to return a flushed tar", RAY),
        "after_publish": Cell("the driver is killed with tar and index linked, and no journal row for them", RAY),
        "before_manifest": Cell("the driver is killed with everything in the journal and no manifest"),
    },
    "node_stopped": {
        "before_temporary": Cell("the second node (raylet, agent, workers) is killed under the held worker", CLUSTER),
        "mid_tar": Cell("the second node is killed under a worker with half a tar written", CLUSTER),
        "after_fsync": Cell("the second node is killed under a worker about to return", CLUSTER),
        "after_publish": Cell("the second node is killed while the committer has linked a shard made there", CLUSTER),
        "before_manifest": Cell(cannot=_LEFT),
    },
    "disk_full": {
        "before_temporary": Cell("the tmpfs has no inode left: the temporary file itself cannot be made", ALONE),
        "mid_tar": Cell("the tmpfs has no block left: the second half of the tar cannot be written", ALONE),
        "after_fsync": Cell("no inode left: the hard link fails (tmpfs counts links, as ext4 may need a folder block)"),
        "after_publish": Cell("no block left: links take none, but the row cannot be appended to the journal"),
        "before_manifest": Cell("no block left: the quarantine and manifest tables cannot be written"),
    },
    "publish_fails": {
        "before_temporary": Cell(cannot=_NOT_YET),
        "mid_tar": Cell(cannot=_NOT_YET),
        "after_fsync": Cell("the link of the index fails; in the rerun, the link of the tar; the third run ends well"),
        "after_publish": Cell("the fsync of the journal fails, its row being written"),
        "before_manifest": Cell("the rename of the first table fails; in the rerun, that of the second one"),
    },
    "zombie_worker": {
        "before_temporary": Cell("a node freezes with a worker about to begin; it wakes after the job has ended", CLUSTER),
        "mid_tar": Cell("a node freezes with half a tar written; it wakes after the job has ended", CLUSTER),
        "after_fsync": Cell("a node freezes with a worker about to return; it wakes after the job has ended", CLUSTER),
        "after_publish": Cell(
            "a node freezes mid-tar; it wakes, and finishes its tar, when the retried unit has just been linked", CLUSTER
        ),
        "before_manifest": Cell("a node freezes mid-tar; it wakes, and finishes, just before the manifest", CLUSTER),
    },
    "submitted_twice": {
        point: Cell(f"while the first run stands {PLACES[point]}, the same job is submitted again and refused; the first ends")
        for point in POINTS
    },
}  # fmt: skip


def cells(fault: str) -> list[tuple[str, str]]:
    """(point, modality) of the cells of `fault` that exist."""
    return [(point, modality) for point in POINTS if not TABLE[fault][point].cannot for modality in MODALITIES]


def document() -> str:
    """docs/faults.md."""
    count = sum(len(cells(fault)) for fault in FAULTS)
    total = len(FAULTS) * len(POINTS) * len(MODALITIES)
    lines = [_HEAD.format(count=count, total=total, cannot=total - count, records=RECORDS, each=IN_ONE_SHARD)]
    for fault, title in FAULTS.items():
        lines += [f"## {title[0].upper()}{title[1:]}", ""]
        lines += ["| point | " + " | ".join(MODALITIES) + " | what is done, or why it cannot exist | where |"]
        lines += ["|---|" + ":-:|" * len(MODALITIES) + "---|---|"]
        for point in POINTS:
            cell = TABLE[fault][point]
            marks = " | ".join(["—" if cell.cannot else "runs"] * len(MODALITIES))
            said = f"cannot exist: {cell.cannot}" if cell.cannot else cell.how
            lines.append(f"| {PLACES[point]} | {marks} | {said} | {'' if cell.cannot else cell.where} |")
        lines.append("")
    return "\n".join(lines)


_HEAD = """# The kill matrix

Written from the table in `tests/faults/cells.py` by `python -m tests.faults.cells`; do not edit it here.

`make faults` runs {count} cells of {total} combinations (7 faults, 5 points, 3 modalities); {cannot} cannot exist, with the
reason beside them. Each cell runs the verb `shard` in a process of its own over a corpus of {records} records ({each} in a
shard), is held at the point by `MMLM_FAULTPOINT` (see `mmlm/shards/faultpoints.py`), is struck there by the real fault, and
is run again. Then, in every cell: each file of the shard set has the sha256 that an undisturbed run gives; every id stands
in the tars once; nothing else lies in the folder; `mmlm verify` finds nothing; no process, no Ray folder in `/tmp` and no
shared memory is left. A worker's death costs one unit of rework; a rerun leaves what was in the journal untouched.

The faults are real: signals; a full `tmpfs` (needs root, else the cell skips itself and says so); errors put into single
system calls by `strace -e inject=` (Debian and Ubuntu: `apt-get install strace`; skips itself where it is missing or may not
attach); a second raylet on this machine at 127.0.0.2. A frozen node is a raylet and a worker under SIGSTOP: the cluster
declares the node dead and gives the unit to another worker, then the old worker alone is woken. The cells shorten Ray's
patience for that (`NOTICE` in `tests/faults/stage.py`); it changes when a dead node is noticed, not what becomes of its work.

All of it takes 26 minutes on two cores and closes with pytest's own count: `105 passed` in 1,556 s on 29 November 2026 (the
cells, a node that is lost under a training, and an MLflow that is down, slow or killed under one).

The points: *before the temporary file* of a unit is opened; *mid-tar*, half of its records written; *after fsync*, tar and
index flushed and the worker about to return; *after publish*, linked under their names and the journal not yet told;
*before the manifest row*, all units in the journal and `manifest.parquet` not yet written. The first three lie in the
worker, the last two in the committer.
"""


if __name__ == "__main__":
    print(document(), end="")
