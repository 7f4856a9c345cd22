"""Checkpoints to resume from: float32 tensors by name, so any number of ranks and any ZeRO stage can go on.

`checkpoints/step-00000250/` holds one safetensors file per kind that the engine gives (weight, exp_avg, exp_avg_sq,
…), or one per rank (saved_tensors.py), and `state.json`: step, hashes, loss of the probe batch, digests of the data,
counters. Among the hashes is that of the rest of `state.json`; checkpoints of earlier versions have none. One is written
under a hidden name and renamed, so one that is there is whole; its hashes are checked all the same before it is used. What
is to go is renamed to a hidden name first, so that a kill in the middle leaves no half one under a good name. Hidden
leftovers (`.*.tmp`) are swept by the next save.

Ranks that write at the same time meet in the hidden folder: rank 0 makes it, each writes its file and then a word that it
has (`rank-00000.json`, with the hash), and rank 0, once all have, writes `state.json` and renames.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

from mmlm.progress import tell
from mmlm.shards.faultpoints import point
from mmlm.storage import fsync_folder, sha256_file, sha256_json, write_json
from mmlm.train.saved_tensors import RANK, Named, Pieces, open_tensors, write_pieces
from mmlm.train.weights import write_tensors

STATE = "state.json"
POINT = "checkpoint"
"""Passed before the first file of a save and after every change that it makes on disk (see `shards/faultpoints.py`)."""


@dataclass(frozen=True)
class Policy:
    """Which checkpoints stay after a save."""

    keep: int = 2
    """The newest so many."""
    every: int = 0
    """Those of steps that are multiples of this; 0: none."""
    best: int = 0
    """The so many with the best score (a lower one is better)."""

    def stay(self, scores: Mapping[int, float | None]) -> set[int]:
        """The steps that stay, of those given with their scores."""
        steps = sorted(scores)
        scored = sorted((score, step) for step, score in scores.items() if score is not None)
        return {
            *steps[-self.keep :],
            *(step for step in steps if self.every and step % self.every == 0),
            *(step for _, step in scored[: self.best]),
        }


@dataclass(frozen=True)
class Saved:
    step: int
    """Steps that were done, taken or skipped."""
    probe: float
    """Loss of the fixed probe batch."""
    state: dict[str, Any]
    """`state.json`."""
    path: Path

    def tensors(self) -> dict[str, Named]:
        """kind → parameter name → whole float32 tensor, read when it is asked for."""
        return open_tensors(self.path, [name for name in self.state["sha256"] if name.endswith(".safetensors")])


def save(
    folder: Path, step: int, tensors: Mapping[str, Mapping[str, torch.Tensor]], state: Mapping[str, Any], policy: Policy
) -> None:
    """Write the checkpoint of `step` whole or not at all, then drop those that `policy` does not keep.

    One that is there for this step already is left alone: it was whole when it got its name.
    """
    temporary = begin(folder, step)
    if temporary:
        hashes = {}
        for kind, named in tensors.items():
            path = temporary / f"{kind}.safetensors"
            hashes[path.name] = write_tensors(dict(named), path)
            point(POINT)
        _publish(temporary, step, {**state, "sha256": hashes})
    _drop_others(folder, policy)


def begin(folder: Path, step: int) -> Path | None:
    """Make the hidden folder in which the checkpoint of `step` is written; None where there is one already."""
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    if (folder / name_of(step)).exists():
        return None
    point(POINT)
    # a name of its own: a rank of an earlier attempt that is not dead yet writes into nothing of this one
    temporary = folder / f".{name_of(step)}.{uuid4().hex[:8]}.tmp"
    temporary.mkdir()
    return temporary


def save_pieces(temporary: Path, rank: int, pieces: Pieces) -> None:
    """Write one rank's part of the checkpoint that was begun in `temporary`, and say that it is written."""
    path = temporary / RANK.format(rank)
    digest = write_pieces(pieces, path)
    point(POINT)
    write_json(path.with_suffix(".json"), {"sha256": digest, "bytes": path.stat().st_size})
    point(POINT)


def have_written(temporary: Path, ranks: int) -> bool:
    """Whether the parts of all ranks are there, with as many bytes as they say.

    Asked for by a listing first: a name that is asked for too early may be taken for missing for a minute on NFS.
    """
    files = [temporary / RANK.format(rank) for rank in range(ranks)]
    try:
        there = set(os.listdir(temporary))
        return all(f.with_suffix(".json").name in there for f in files) and all(_size_is_told(f) for f in files)
    except FileNotFoundError:
        return False


def _size_is_told(path: Path) -> bool:
    told = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["bytes"]
    return bool(path.stat().st_size == told)


def commit(temporary: Path, step: int, state: Mapping[str, Any], policy: Policy) -> None:
    """Give the parts that the `ranks` of `state` have written the name of a checkpoint, then drop those that `policy` does
    not keep. Raises FileNotFoundError without the part of one."""
    hashes = {}
    for rank in range(state["ranks"]):
        word = (temporary / RANK.format(rank)).with_suffix(".json")
        hashes[RANK.format(rank)] = json.loads(word.read_text(encoding="utf-8"))["sha256"]
        word.unlink()
    _publish(temporary, step, {**state, "sha256": hashes})
    _drop_others(temporary.parent, policy)


def _publish(temporary: Path, step: int, state: Mapping[str, Any]) -> None:
    write_json(temporary / STATE, sealed({**state, "step": step}))
    point(POINT)
    fsync_folder(temporary)
    temporary.rename(temporary.parent / name_of(step))
    point(POINT)
    fsync_folder(temporary.parent)


def _drop_others(folder: Path, policy: Policy) -> None:
    for old in sorted(steps(folder) - policy.stay(scores(folder))):
        drop(folder, old)


def sealed(state: Mapping[str, Any]) -> dict[str, Any]:
    """`state` with its own hash among those of the files, in the place of one that is there."""
    plain = json.loads(json.dumps({**state, "sha256": {n: h for n, h in state["sha256"].items() if n != STATE}}))
    return {**plain, "sha256": {**plain["sha256"], STATE: sha256_json(plain)}}


def name_of(step: int) -> str:
    return f"step-{step:08d}"


def steps(folder: Path) -> set[int]:
    """The steps whose checkpoints are there."""
    return {int(path.name[5:]) for path in folder.glob("step-*") if path.name[5:].isdigit()}


def scores(folder: Path) -> dict[int, float | None]:
    """step → score of its checkpoint, None where there is none."""
    found: dict[int, float | None] = {}
    for step in steps(folder):
        try:
            score = read(folder, step).state["score"]
            found[step] = score if math.isfinite(score) else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            found[step] = None
    return found


def best(folder: Path, say: Callable[[str], None] = tell) -> Saved | None:
    """The intact checkpoint with the best (lowest) score. Damaged ones are set aside."""
    scored = sorted((score, step) for step, score in scores(folder).items() if score is not None)
    return next((saved for _, step in scored if (saved := intact(folder, step, say))), None)


def drop(folder: Path, step: int) -> None:
    """Remove one checkpoint; killed in the middle, it is gone all the same."""
    gone = folder / f".{name_of(step)}.gone.tmp"
    (folder / name_of(step)).rename(gone)
    point(POINT)
    shutil.rmtree(gone)
    point(POINT)


def sweep(folder: Path) -> None:
    """Remove what killed saves and removals left."""
    for leftover in folder.glob(".*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def read(folder: Path, step: int) -> Saved:
    """The checkpoint of `step`, the hashes of its tensors not looked at.

    Raises OSError, ValueError, KeyError, TypeError or AttributeError when its `state.json` is damaged.
    """
    path = folder / name_of(step)
    state = json.loads((path / STATE).read_text(encoding="utf-8"))
    if STATE in state["sha256"] and state["sha256"][STATE] != sealed(state)["sha256"][STATE]:
        raise ValueError(f"{STATE} does not match its hash")
    if state["step"] != step:
        raise ValueError(f"{STATE} is of step {state['step']}")
    return Saved(int(state["step"]), float(state["probe"]), state, path)


def data_of(folder: Path) -> dict[str, str]:
    """What the newest checkpoint whose state can be read says of its data; empty without one."""
    for step in sorted(steps(folder), reverse=True):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            return dict(read(folder, step).state["data"])
    return {}


def intact(folder: Path, step: int, say: Callable[[str], None] = tell) -> Saved | None:
    """The checkpoint of `step`, or None when it is damaged: told of, and set aside as `damaged-step-…`."""
    path = folder / name_of(step)
    try:
        saved = read(folder, step)
        hashes = {name: wanted for name, wanted in saved.state["sha256"].items() if name != STATE}
        if RANK.format(0) in hashes and hashes.keys() != {RANK.format(rank) for rank in range(saved.state["ranks"])}:
            raise ValueError(f"{sorted(hashes)} are not the parts of {saved.state['ranks']} ranks")
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for name, found in zip(hashes, pool.map(lambda name: sha256_file(path / name), hashes), strict=True):
                if found != hashes[name]:
                    raise ValueError(f"{name} does not match its hash")
        return saved
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        aside = folder / f"damaged-{path.name}"
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        why = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        say(f"the checkpoint {path.name} is damaged ({why}): set aside as {aside.name}, taking the next one")
        return None


def newest(folder: Path, say: Callable[[str], None] = tell, *, at_most: int | None = None) -> Saved | None:
    """The newest intact checkpoint, of no later step than `at_most`, or None. Damaged ones are set aside."""
    wanted = (step for step in sorted(steps(folder), reverse=True) if at_most is None or step <= at_most)
    return next((saved for step in wanted if (saved := intact(folder, step, say))), None)
