"""Checkpoints to resume from: whole float32 tensors by name, so any number of ranks and any ZeRO stage can go on.

`checkpoints/step-00000250/` holds one safetensors file per kind that the engine gives (weight, exp_avg, exp_avg_sq,
…) and `state.json`: step, hashes, loss of the probe batch, digests of the data, counters. Among the hashes is that of
the rest of `state.json`; checkpoints of earlier versions have none. One is written under a hidden name and renamed, so
one that is there is whole; its hashes are checked all the same before it is used. What is to go is renamed to a hidden
name first, so that a kill in the middle leaves no half one under a good name. Hidden leftovers (`.*.tmp`) are swept by
the next save.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mmlm.progress import tell
from mmlm.shards.faultpoints import point
from mmlm.storage import fsync_folder, sha256_file, sha256_json, write_json
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

    def tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """kind → parameter name → whole float32 tensor."""
        names = sorted(name for name in self.state["sha256"] if name.endswith(".safetensors"))
        return {name.removesuffix(".safetensors"): load_file(self.path / name) for name in names}


def save(
    folder: Path, step: int, tensors: Mapping[str, Mapping[str, torch.Tensor]], state: Mapping[str, Any], policy: Policy
) -> None:
    """Write the checkpoint of `step` whole or not at all, then drop those that `policy` does not keep.

    One that is there for this step already is left alone: it was whole when it got its name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    final = folder / name_of(step)
    if not final.exists():
        temporary = folder / f".{final.name}.tmp"
        point(POINT)
        temporary.mkdir()
        hashes = {}
        for kind, named in tensors.items():
            path = temporary / f"{kind}.safetensors"
            hashes[path.name] = write_tensors(dict(named), path)
            point(POINT)
        write_json(temporary / STATE, sealed({**state, "step": step, "sha256": hashes}))
        point(POINT)
        fsync_folder(temporary)
        temporary.rename(final)
        point(POINT)
        fsync_folder(folder)
    stay = policy.stay(scores(folder))
    for old in sorted(steps(folder) - stay):
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
        for name, wanted in saved.state["sha256"].items():
            if name != STATE and sha256_file(path / name) != wanted:
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
