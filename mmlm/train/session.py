"""Session: everything of a training that is not arithmetic, held together for the loop; the same calls on every rank."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch

from mmlm.data.collate import Batch
from mmlm.data.loader import Loader
from mmlm.errors import ArtifactError
from mmlm.progress import Progress, tell
from mmlm.train import adapted, engine
from mmlm.train.config import LoopConfig
from mmlm.train.control import Stop, Where, first_save
from mmlm.train.groups import frozen_share
from mmlm.train.guard import Guard
from mmlm.train.keeper import Keeper, on_main
from mmlm.train.ledger import Ledger
from mmlm.train.objectives import Objective, loss_of
from mmlm.train.planning import saved_bytes
from mmlm.train.proof import Part
from mmlm.train.telemetry import Telemetry
from mmlm.train.validation import Validation
from mmlm.world import World


class Session:
    """Checkpoints, guard, validation, ledger and telemetry of one attempt."""

    def __init__(
        self, trainer: engine.DeepSpeedEngine, objective: Objective, loader: Loader, config: LoopConfig, shards: Path,
        out: Path, name: str, where: Where, world: World, device: torch.device, beat: Callable[[str, float], None],
    ) -> None:  # fmt: skip
        """`beat` is told what begins, and how many seconds it may be expected to take where these are many."""
        self.trainer, self.objective, self.loader, self.config = trainer, objective, loader, config
        self.shards, self.out, self.name, self.where, self.world, self.device = shards, out, name, where, world, device
        self.beat = beat
        data = {**loader.state(), **adapted.base_of(config)}
        self.keeper = Keeper(out, config, world, trainer, self.probe, data, device)
        self.guard = Guard(config.spikes, out, world.is_main, name)
        self.validation = Validation(shards, config, world, device)
        self.ledger = Ledger(out, world.rank, where.ledger)
        model: Any = trainer.module
        self.telemetry = Telemetry(out, world, device, config.precision, model.config, loader.reader.spec)
        self.telemetry.frozen = frozen_share(trainer.module)
        self._first_save = first_save(saved_bytes(config, *sizes_of(trainer.module)))
        self._attempts = 0
        self._seen: dict[str, float] = {}
        """The last row of validation, for the next row of the log."""

    # beginning, going back, ending

    def resume(self) -> int:
        """Go on from the newest intact checkpoint, proved on the probe batch. Returns the step to do next, from 0."""
        self.guard.take(engine.broadcast(self.guard.kept() if self.world.is_main else None))
        if self.guard.going_back is not None and self.keeper.steps():
            return self._go_back(self.guard.going_back)
        self.beat("looking for the newest checkpoint", self.save_seconds)
        saved = self.keeper.newest()
        if saved is None and self.where.resume:
            raise ArtifactError(
                f"{self.keeper.folder} holds no intact checkpoint", wanted="one to go on from (--resume)",
                cure="leave --resume away to begin anew",
            )  # fmt: skip
        if saved is None and (count := self.guard.forget()) and self.world.is_main:
            tell(f"{self.name}: begun anew, without a checkpoint; the {count} steps that were skipped are tried again")
        if saved:
            self.beat(f"going on from step {saved.step}", self.save_seconds)
            proof = self.keeper.restore(saved)
            self._load(saved.state)
            if self.world.is_main:
                tell(f"{self.name}: going on from step {saved.step}, {proof}")
        return self._begin(saved.step if saved else 0)

    def roll_back(self) -> int:
        """Back to the checkpoint before the bad steps, whose data are not seen again. Returns the step to do next."""
        return self._go_back(self.guard.roll_back(self.keeper.steps()))

    def _go_back(self, step: int) -> int:
        self.beat(f"going back to step {step}", 2 * self.save_seconds)
        saved = self.keeper.back_to(step)
        self.guard.is_back()
        kept, rollbacks = self.guard.skipped, self.guard.rollbacks
        self._load(saved.state)
        self.guard.bad = []
        if self.world.is_main:
            tell(
                f"{self.name}: rolled back to step {saved.step} ({rollbacks} so far); {len(kept)} steps are skipped in all"
            )
        return self._begin(saved.step)

    def _load(self, state: dict[str, Any]) -> None:
        if "guard" in state:
            self.guard.load(state["guard"])
        if "validation" in state:
            self.validation.load(state["validation"])
        self.validation.seconds = max(self.validation.seconds, state.get("look_seconds", 0.0))

    def _begin(self, step: int) -> int:
        self.telemetry.rewind(step)
        self._attempts = engine.broadcast(self.ledger.count() + 1)
        self.ledger.begin(self._attempts, step, self.world.size)
        return step

    def finish(self, step: int) -> dict[str, float]:
        """Write the model. Returns the stage's figures."""
        self.beat("writing the model", 2 * self.save_seconds)
        self.keeper.finish()
        tensors, export = self._exported(step)
        settings: Any = self.config
        model, spec = cast(Any, self.trainer.module).config, self.loader.reader.spec
        on_main(lambda: adapted.save_model(self.out, tensors, settings, model, spec, self.shards), self.world)
        counts: dict[str, float] = {"steps": step, "ranks": self.world.size, "zero_stage": self.config.zero.stage}
        if self.guard.skipped:
            counts |= {"skipped": len(self.guard.skipped), "rollbacks": self.guard.rollbacks}
        if self.loader.left_out:
            counts["damaged"] = self.loader.left_out
        return {**counts, "exported_step": export} if self.config.validation.every else counts

    def _exported(self, done: int) -> tuple[dict[str, torch.Tensor], int]:
        """The weights that become the model, and the step that they are of."""
        tensors = self.trainer.result()
        found = self.keeper.best() if self.config.validation.export == "best" else None
        if found is None:
            return tensors, done
        kind = "ema" if self.config.ema and self.config.ema.use else "weight"
        return dict(found.tensors()[kind]) if self.world.is_main else {}, found.step

    # in every step

    def passes_over(self, step: int, batches: list[Batch]) -> bool:
        """Whether `step` was skipped before, by an earlier attempt or a roll-back, and is again."""
        reason = self.guard.skipped.get(step, "")
        if reason:
            self.ledger.write(step, _ids(batches), reason)
            self.trainer.pass_over()
            self.guard.pass_over(step)
        return bool(reason)

    def wants_to_stop(self, stop: Stop, step: int) -> bool:
        """Asked before the step after `step` ones. When it is too late after that one, one more will have been taken."""
        longest = self.telemetry.longest
        looks = sum(self.validation.due(step + n) for n in (1, 2))
        look = self.validation.expected(longest, self.config.data.batch)
        return stop.wanted(2 * longest, self.save_seconds, looks * look) or self.keeper.failed

    @property
    def save_seconds(self) -> float:
        """Of the longest save; while there was none, what its size lets expect."""
        return self.keeper.seconds or self._first_save

    def note(self, step: int, batches: list[Batch], figures: dict[str, float], bad: str) -> None:
        """What became of `step`: taken, or skipped for `bad` or for a gradient that is no number."""
        norm = figures["gradient_norm"]
        scaling = self.config.precision == "fp16"  # an overflow only makes the scale smaller
        if not bad and not scaling and not math.isfinite(norm):
            bad = f"the gradient's norm is {norm}"
        self.ledger.write(step, _ids(batches), bad)
        if bad:
            ids = [name for some in engine.gather(_ids(batches)) for name in some]
            figures = {key: value if math.isfinite(value) else str(value) for key, value in figures.items()}  # type: ignore[misc]
            self.guard.skip(step, bad, {**figures, "ids": ids, "mean": self.guard.mean})
            if self.world.is_main:
                tell(f"{self.name}: step {step + 1} is skipped: {bad}; see {self.guard.folder}")

    def log(self, step: int, figures: dict[str, float], progress: Progress) -> None:
        """A row of `metrics.jsonl` where one is due."""
        if step % self.config.log_every and step != self.config.steps:
            return
        seen = {"skipped": len(self.guard.skipped), "damaged": self.loader.left_out}
        extra = {name: float(count) for name, count in seen.items() if count}
        figures = {key: value for key, value in figures.items() if math.isfinite(value)}
        row = self.telemetry.row(step, {**figures, **extra})
        if self.world.is_main:
            note = f"loss {figures.get('loss', math.nan):.3f}, {row['tokens_per_second']:,.0f} tokens/s"
            progress.set(step, f"{note}, MFU {row['mfu']:.0%}")

    def validate(self, step: int) -> None:
        """Look at the validation split where it is due."""
        self.validation.improved = False
        if self.validation.due(step):
            with self.telemetry.clock.phase("validation"):
                self._seen = self.validation.run(self.trainer, step, self.beat)
            self.telemetry.write(step, self._seen)

    def save(self, step: int, *, due: bool, wait: bool) -> None:
        """A checkpoint where one is due: every so often, when the validation was better than ever, or when asked."""
        best = self.validation.improved and self.keeper.policy.best > 0
        if not (due or best or step % self.config.save_every == 0):
            return
        looked = self.validation.due(step)
        state = {
            "guard": self.guard.state(),
            "validation": self.validation.state(),
            "look_seconds": self.validation.seconds,
            "score": self.validation.score(self._seen) if looked else None,
        }
        self.beat(f"saving step {step}", 2 * self.save_seconds)  # with what is left of the save before
        with self.telemetry.clock.phase("save"):
            self.keeper.save(step, state, wait=wait)

    def probe(self, parts: int) -> list[Part]:
        """The fixed probe batch in `parts` parts with their losses; every rank computes the same."""
        found, objective = [], self.objective.alone()
        with torch.no_grad(), self.trainer.evaluating():
            for batch in self.loader.probes(parts):
                there = batch.to(self.device)
                loss = loss_of(objective(self.trainer.model, there), objective.counts(there))
                found.append(Part(float(loss), batch.ids))
        return found


def sizes_of(model: torch.nn.Module) -> tuple[int, int]:
    """Parameters that are trained, and those that rest."""
    sizes = {True: 0, False: 0}
    for p in model.parameters():
        sizes[p.requires_grad] += int(getattr(p, "ds_numel", None) or p.numel())  # whole under ZeRO-3 as well
    return sizes[True], sizes[False]


def _ids(batches: list[Batch]) -> list[str]:
    return [name for batch in batches for name in batch.ids]
