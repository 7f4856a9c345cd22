"""Keeper: checkpoints of a running training, on all ranks. Every rank calls every method at the same step.

A full checkpoint is gathered while all wait; rank 0 then hashes and writes it in a thread while training goes on. Of a
sharded one each rank copies what it holds, and its thread writes that; rank 0's thread waits for the others' files and
makes a checkpoint of them. No thread takes part in anything collective, so a slow or full disk cannot hang the other ranks:
what went wrong is told to all of them at the next save, or at once when this one has to be safe on the disk before going on
(`wait`).
"""

from __future__ import annotations

import contextlib
import json
import math
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from mmlm.errors import ArtifactError, LaunchError, MmlmError, explain_os_error
from mmlm.progress import tell
from mmlm.storage import write_json
from mmlm.train import checkpoint, engine, proof
from mmlm.train.checkpoint import Policy, Saved
from mmlm.train.config import LoopConfig
from mmlm.train.proof import PARTS, Part, Proof
from mmlm.train.saved_tensors import Pieces, is_sharded
from mmlm.world import World

FOLDER = "checkpoints"
LOOK_SECONDS = 0.05
"""Between two looks for the files of other ranks."""
SIGHT_SECONDS = 90.0
"""For which a file that another node has written may not be seen: Linux's NFS looks at a folder again after 60 s at most."""
SECONDS = "seconds.json"
"""Of the longest save so far; beside the checkpoints, since one does not know how long it took itself."""


class Keeper:
    """Saves and restores `trainer`. `probe` gives the fixed probe batch in so many parts; `data` is the loader's state."""

    def __init__(
        self, out: Path, config: LoopConfig, world: World, trainer: engine.DeepSpeedEngine,
        probe: Callable[[int], list[Part]], data: Mapping[str, Any], device: torch.device,
    ) -> None:  # fmt: skip
        self.folder, self.config, self.world, self.device = out / FOLDER, config, world, device
        self.trainer, self.probe, self.data = trainer, probe, dict(data)
        best = config.keep_best or int(config.validation.export == "best")
        self.policy = Policy(config.keep, config.keep_every, best)
        self.sharded = is_sharded(config, world.size, trainer.trained_bytes)
        self.seconds = 0.0
        """The longest save so far, from the wish to the last byte; 0 before the first."""
        self._thread: threading.Thread | None = None
        self._written, self._all_written, self._give_up = (threading.Event() for _ in range(3))
        """Of a sharded save: this rank's part is written, or cannot be; all are; one will never be."""
        self._problem: MmlmError | None = None

    @property
    def failed(self) -> bool:
        """Whether this rank could not write what it was last given."""
        return self._problem is not None

    def save(self, step: int, state: Mapping[str, Any], *, wait: bool) -> None:
        """Save after `step` steps. Raises LaunchError on every rank when this save (with `wait`) or the last failed."""
        started = time.monotonic()
        self._settle()
        told = {"scalars": self.trainer.scalars(), "data": self.data, "ranks": self.world.size}
        row = {**state, **proof.row(self.probe(PARTS)), **told}
        if self.sharded:
            temporary = self._begin(step)
            if temporary:
                pieces = self.trainer.pieces()
                self._start(lambda: self._write_part(temporary, step, pieces, row), started)
        else:
            tensors = self.trainer.state()
            if self.world.is_main:
                self._start(lambda: checkpoint.save(self.folder, step, tensors, row, self.policy), started)
        if wait:
            self._settle()

    def _begin(self, step: int) -> Path | None:
        """The hidden folder that rank 0 makes for all, or None where that step is saved already."""
        made: list[Path | None] = []
        on_main(lambda: made.append(checkpoint.begin(self.folder, step)), self.world)
        name = engine.broadcast(made[0].name if made and made[0] else "")
        return self.folder / name if name else None

    def _start(self, write: Callable[[], None], started: float) -> None:
        for event in (self._written, self._all_written, self._give_up):
            event.clear()
        self._thread = threading.Thread(target=self._write, args=(write, started), name="mmlm-save")
        self._thread.start()

    def _write(self, write: Callable[[], None], started: float) -> None:
        try:
            write()
        except OSError as error:
            self._problem = explain_os_error(error) or LaunchError(f"cannot write the checkpoint ({error})")
        except MmlmError as error:
            self._problem = error
        except Exception as error:  # a thread's traceback would go unseen
            self._problem = LaunchError(f"cannot write the checkpoint ({type(error).__name__}: {error})")
        self._written.set()
        self.seconds = max(self.seconds, time.monotonic() - started)
        if self.world.is_main:
            with contextlib.suppress(OSError):  # the next attempt knows it from its first step on
                write_json(self.folder / SECONDS, self.seconds)

    def _write_part(self, temporary: Path, step: int, pieces: Pieces, row: Mapping[str, Any]) -> None:
        """This rank's file, and by rank 0, when those of all ranks are there, the checkpoint."""
        if not temporary.is_dir():
            raise LaunchError(
                f"rank {self.world.rank} does not see {temporary}, which rank 0 has made",
                cure="put --out on storage that all nodes share, or give checkpoint_format full",
            )
        checkpoint.save_pieces(temporary, self.world.rank, pieces)
        self._written.set()
        if not self.world.is_main:
            return
        if self._all_are_there(temporary):
            checkpoint.commit(temporary, step, row, self.policy)

    def _all_are_there(self, temporary: Path) -> bool:
        """By rank 0: wait for the files of all ranks. False when one will never come, which `_settle` knows; raises
        LaunchError when all have written and some cannot be seen."""
        until = math.inf
        while not checkpoint.have_written(temporary, self.world.size):
            if self._give_up.wait(LOOK_SECONDS) or not threading.main_thread().is_alive():
                return False
            if self._all_written.is_set():
                until = min(until, time.monotonic() + SIGHT_SECONDS)
            if time.monotonic() > until:
                raise LaunchError(
                    f"all ranks have written into {temporary}, and rank 0 does not see all of their files",
                    cure="put --out on storage that all nodes share, or give checkpoint_format full",
                )
        return True

    def _settle(self) -> None:
        """Wait for what is being written; when it failed, every rank raises the same LaunchError."""
        problem: MmlmError | None = None
        if self.sharded:
            if self._thread is not None:
                self._written.wait()
            problem = first_of_all(self._problem)
            (self._give_up if problem else self._all_written).set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        own, self._problem = self._problem, None
        raise_everywhere(problem or own)

    def finish(self) -> None:
        """Everything given is on the disk, or LaunchError."""
        self._settle()

    def newest(self, at_most: int | None = None) -> Saved | None:
        """The newest intact checkpoint, of no later step than `at_most`."""
        return self._checked(lambda say: checkpoint.newest(self.folder, say, at_most=at_most))

    def best(self) -> Saved | None:
        """The intact checkpoint with the best score."""
        return self._checked(lambda say: checkpoint.best(self.folder, say))

    def _checked(self, look: Callable[[Callable[[str], None]], Saved | None]) -> Saved | None:
        """What `look` finds, looked for and checked by rank 0 alone, which tells of damaged ones."""
        found = look(lambda text: tell(f"train: {text}")) if self.world.is_main else None
        step = engine.broadcast(found.step if found else None)
        return found if step is None or found else checkpoint.read(self.folder, step)

    def restore(self, saved: Saved) -> Proof:
        """Load `saved` and prove it: the same data, and the probe batch has the loss that it had, where its records are
        the same; of others is told.

        Raises ArtifactError with both numbers, or both digests, when it is not the same.
        """
        self._require_same_data(saved)
        self.trainer.load(saved.tensors(), saved.state.get("scalars", {}))
        with contextlib.suppress(OSError, ValueError, TypeError):
            self.seconds = max(self.seconds, float(json.loads((self.folder / SECONDS).read_text(encoding="utf-8"))))
        parts = proof.parts_of(saved.state)
        found = Proof(parts, self.probe(len(parts)))
        if sum(engine.total([float(not found.holds(self.config.precision))], self.device)):
            start = f"remove the folder {self.folder} to start over, and report this"
            look = (
                "run `mmlm verify` on the shard set: a record that was damaged or repaired since makes this, too; else "
            )
            raise ArtifactError(
                f"the resumed model's loss on the probe batch is {proof.loss(found.now):.6f}",
                wanted=f"{proof.loss(found.then):.6f}, as when step {saved.step} was saved",
                cure=start if found.named else look + start,
            )
        if self.world.is_main:
            for line in found.why():
                tell(f"train: {line}")
        return found

    def _require_same_data(self, saved: Saved) -> None:
        for name, there in saved.state.get("data", {}).items():
            here = self.data.get(name)
            if here != there:
                raise ArtifactError(
                    f"the data of the checkpoint {saved.path.name} have the {name} {there}",
                    wanted=f"{here}, as the data here",
                    cure=f"train on the data that it was begun with, or remove {self.folder} to start over",
                )

    def steps(self) -> list[int]:
        """Steps whose checkpoints are there, once what is being written is there, too."""
        self._settle()
        return engine.broadcast(sorted(checkpoint.steps(self.folder)))

    def back_to(self, step: int) -> Saved:
        """Restore the newest intact checkpoint up to `step` and remove those after it: they lead to where training must
        not go again. Raises ArtifactError when there is none."""
        saved = self.newest(step)
        if saved is None:
            raise ArtifactError(
                f"{self.folder} holds no intact checkpoint up to step {step}", wanted="one to roll back to",
                cure=f"remove the folder {self.folder} to start over",
            )  # fmt: skip
        self.restore(saved)

        def drop() -> None:
            for later in checkpoint.steps(self.folder):
                if later > saved.step:
                    checkpoint.drop(self.folder, later)

        on_main(drop, self.world)
        return saved


def on_main(write: Callable[[], None], world: World) -> None:
    """Let rank 0 write while the others wait; when it cannot (a full disk), every rank raises the same LaunchError."""
    problem: MmlmError | None = None
    if world.is_main:
        try:
            write()
        except OSError as error:
            problem = explain_os_error(error) or LaunchError(f"cannot write ({error})")
    raise_everywhere(problem)


def first_of_all(problem: MmlmError | None) -> MmlmError | None:
    """The `problem` of the first rank that has one, on every rank."""
    told = engine.gather((problem.found, problem.cure) if problem else None)
    return next((LaunchError(found, cure=cure) for found, cure in filter(None, told)), None)


def raise_everywhere(problem: MmlmError | None) -> None:
    """Raise rank 0's `problem`, if it has one, on every rank."""
    told = engine.broadcast((problem.found, problem.cure) if problem else None)
    if told:
        raise LaunchError(told[0], cure=told[1])
