"""Checkpoints to resume from: whole float32 tensors by name, so any number of ranks and any ZeRO stage can go on.

`checkpoints/step-00000250/` holds weights and optimizer states, a kind a safetensors file, and `state.json` (step,
hashes, counters, loss of the probe batch). It is written under a temporary name and renamed, so one that is there is
whole; its hashes are checked all the same before it is used.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from mmlm.storage import fsync_folder, sha256_file, write_json
from mmlm.train.weights import write_tensors


@dataclass(frozen=True)
class Saved:
    step: int
    """Optimizer steps that were taken."""
    probe: float
    """Loss of the fixed probe batch."""
    tensors: dict[str, dict[str, torch.Tensor]]
    """By kind (weight, exp_avg, …) and name."""
    scalars: dict[str, float]


def save(
    folder: Path,
    step: int,
    tensors: dict[str, dict[str, torch.Tensor]],
    scalars: dict[str, float],
    probe: float,
    keep: int,
) -> None:
    """Write the checkpoint of `step` whole or not at all, then drop all but the newest `keep`."""
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:08d}"
    temporary = folder / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    hashes = {}
    for kind, named in tensors.items():
        path = temporary / f"{kind}.safetensors"
        write_tensors(named, path)
        hashes[path.name] = sha256_file(path)
    write_json(temporary / "state.json", {"step": step, "probe": probe, "scalars": scalars, "sha256": hashes})
    fsync_folder(temporary)
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    fsync_folder(folder)
    for old in sorted(folder.glob("step-*"))[:-keep]:
        shutil.rmtree(old)


def newest(folder: Path) -> Saved | None:
    """The newest intact checkpoint, or None. A damaged one is passed over, and said so."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            state = json.loads((path / "state.json").read_text())
            for name, wanted in state["sha256"].items():
                if sha256_file(path / name) != wanted:
                    raise ValueError(f"{name} does not match its hash")
            tensors = {Path(name).stem: load_file(path / name) for name in state["sha256"]}
            return Saved(int(state["step"]), float(state["probe"]), tensors, state["scalars"])
        except (OSError, ValueError, KeyError) as error:
            print(f"train: {path.name} is damaged ({error}); trying the one before", file=sys.stderr)
    return None
