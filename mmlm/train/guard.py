"""Guard: steps whose loss is not finite, or leaps, change nothing; many of them roll the training back.

A bad step is skipped: its gradients are dropped on every rank (all see the same summed loss, so all agree) and it is
remembered with its evidence in `evidence/`. After `rollback_after` bad steps within `window` the training goes back to
the last checkpoint before the first of them and does not see their data again, nor that of as many steps before it
(the cure of Chowdhery et al. 2022, section 5.1). `evidence/skipped.json` outlives a kill: what was skipped stays so, as
long as there is a checkpoint to go on from.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmlm.errors import DataError
from mmlm.storage import write_json
from mmlm.train.config import SpikesConfig

FOLDER, SKIPPED = "evidence", "skipped.json"


class Guard:
    """Judges losses; the same on every rank, since it is given the same numbers. Rank 0 (`main`) keeps the evidence."""

    horizon = 50
    """Steps over which mean and variance run."""

    def __init__(self, config: SpikesConfig, out: Path, main: bool, name: str) -> None:
        self.config, self.folder, self.main, self.name = config, out / FOLDER, main, name
        self.mean, self.variance, self.seen = 0.0, 0.0, 0
        self.bad: list[int] = []
        """Recent bad steps."""
        self.skipped: dict[int, str] = {}
        """step → why it changes nothing."""
        self.settled: set[int] = set()
        """Those that a roll-back went before: they count as bad no more."""
        self.rollbacks = 0
        self.going_back: int | None = None
        """The step that a roll-back goes to, until no later checkpoint is left: a kill in between must not go on from one."""

    def judge(self, loss: float) -> str:
        """ "" for a good loss, which is then part of the running mean; else what is wrong with it."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        deviation = math.sqrt(self.variance)
        above = loss - self.mean
        if (
            self.config.deviations
            and self.seen >= self.config.warmup
            and above > max(self.config.deviations * deviation, self.config.rise)
        ):
            return f"the loss leapt to {loss:.4g} from about {self.mean:.4g} ± {deviation:.2g}"
        self.seen += 1
        share = 1 / min(self.seen, self.horizon)
        self.mean += share * above
        self.variance = (1 - share) * (self.variance + share * above * above)
        return ""

    def skip(self, step: int, reason: str, evidence: dict[str, Any]) -> None:
        """Step `step` (from 0) changed nothing, for `reason`; keep what is known about it."""
        self._count(step)
        self.skipped[step] = reason
        if self.main:
            write_json(self.folder / f"step-{step + 1:08d}.json", {"step": step + 1, "reason": reason, **evidence})
            self._keep()

    def pass_over(self, step: int) -> None:
        """Step `step` was skipped by an earlier attempt, and is again: as bad as it was then."""
        if step not in self.settled:
            self._count(step)

    def _count(self, step: int) -> None:
        self.bad = [s for s in self.bad if s > step - self.config.window] + [step]

    @property
    def spoiled(self) -> bool:
        """Whether it is time to roll back."""
        return len(self.bad) >= self.config.rollback_after

    def roll_back(self, checkpoints: Sequence[int]) -> int:
        """The step to go back to, of those that have a checkpoint. Raises DataError when it was tried often enough."""
        first, last = self.bad[0], self.bad[-1]
        said = f"{self.name}: {len(self.bad)} of steps {first + 1} to {last + 1} were bad ({self.skipped[last]})"
        cure = f"look at {self.folder}; lower optimizer.lr, or give precision fp32"
        if self.rollbacks >= self.config.give_up_after:
            raise DataError(f"{said}, after {self.rollbacks} roll-backs", cure=cure)
        before = [step for step in checkpoints if step <= first]
        if not before:
            raise DataError(f"{said}, and there is no checkpoint before them", cure=f"{cure}; or save more often")
        lead = max(max(before), first - len(self.bad))
        for step in range(lead, last + 1):
            self.skipped.setdefault(step, f"before the bad step {first + 1}")
            self.settled.add(step)
        self.rollbacks += 1
        self.bad, self.going_back = [], max(before)
        if self.main:
            self._keep()
        return max(before)

    def is_back(self) -> None:
        """The roll-back is over: what it went away from is gone."""
        self.going_back = None
        if self.main:
            self._keep()

    def _keep(self) -> None:
        rows = {str(step): reason for step, reason in self.skipped.items()}
        told = {"steps": rows, "rollbacks": self.rollbacks, "settled": sorted(self.settled)}
        told["going_back"] = self.going_back
        write_json(self.folder / SKIPPED, told)

    def kept(self) -> dict[str, Any]:
        """What `evidence/skipped.json` says; {} without one."""
        try:
            return dict(json.loads((self.folder / SKIPPED).read_text(encoding="utf-8")))
        except FileNotFoundError:
            return {}

    def take(self, kept: dict[str, Any]) -> None:
        """Go on with what rank 0 had `kept`."""
        self.skipped = {int(step): reason for step, reason in kept.get("steps", {}).items()}
        self.settled = set(kept.get("settled", []))
        self.rollbacks = int(kept.get("rollbacks", 0))
        self.going_back = kept.get("going_back")

    def forget(self) -> int:
        """Begin anew: what was bad for weights that are gone need not be so for these. The evidence itself stays.
        Returns how many steps were skipped."""
        count = len(self.skipped)
        self.take({})
        if self.main:
            (self.folder / SKIPPED).unlink(missing_ok=True)
        return count

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"mean": self.mean, "variance": self.variance, "seen": self.seen, "bad": self.bad}

    def load(self, state: dict[str, Any]) -> None:
        self.mean, self.variance, self.seen = state["mean"], state["variance"], state["seen"]
        self.bad = list(state["bad"])
