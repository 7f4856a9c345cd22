"""The loop: what every rank runs, for training and for distillation alike."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mmlm import world as worlds
from mmlm.data.collate import Batch
from mmlm.data.loader import Loader
from mmlm.errors import ArtifactError, DataError, Interrupted, LaunchError, MmlmError, explain_os_error
from mmlm.progress import Progress
from mmlm.train import checkpoint, engine, weights
from mmlm.train.config import LoopConfig
from mmlm.train.objectives import Objective, Term, loss_of
from mmlm.train.schedule import learning_rate
from mmlm.world import World


class Stop:
    """Set by SIGTERM, SIGINT or SIGUSR1: finish the step, save, exit resumable."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            try:
                signal.signal(number, self._ask)
            except ValueError:  # not the main thread: whoever owns the process forwards the wish differently
                return

    def _ask(self, *_: Any) -> None:
        self.asked = True


def fit(
    model: torch.nn.Module, objective: Objective, config: LoopConfig, shards: Path, out: Path, name: str
) -> dict[str, float]:
    """Train `model` for `config.steps` steps from the newest checkpoint below `out`; write its weights into `out`.

    Every rank calls it. Appends rows `{"step", "time", "metrics"}` to `out/metrics.jsonl` from rank 0. Raises
    Interrupted after saving when a signal asked to stop.
    """
    stop, world = Stop(), worlds.from_environment()
    device = engine.device_of(world)
    loader = Loader(shards, config.data, config.seed, world, config.steps)
    trainer = engine.DeepSpeedEngine(model.to(device), config, world)
    first = _resume(trainer, objective, loader, device, out, world)
    log = Log(out / "metrics.jsonl", world, first)
    with Progress(name, config.steps, "steps") as progress:
        progress.resume_at(first)
        for step in range(first, config.steps):
            wait = time.perf_counter()
            batches = loader.batches(step, config.accumulate)
            log.waited(time.perf_counter() - wait)
            counts, asked = _count(objective, batches, stop.asked, device)
            sums = torch.zeros(len(objective.names), device=device)
            for batch in batches:
                terms = objective(trainer.model, batch.to(device))
                trainer.backward(loss_of(terms, counts))
                sums += torch.stack([terms[n].sum.detach().float() for n in objective.names])
            lr = learning_rate(step, config.steps, config.optimizer.lr, config.schedule)
            norm = trainer.update(lr)
            if not math.isfinite(norm) and config.precision != "fp16":  # fp16 lowers its loss scale and goes on
                raise DataError(
                    f"{name}: the gradient of step {step + 1} is not a finite number",
                    cure=f"lower optimizer.lr, or give precision fp32; the last good checkpoint is in {out}/checkpoints",
                )
            last = step + 1 == config.steps
            if (step + 1) % config.log_every == 0 or last:
                means = _means(terms, counts, sums, device)
                log.write(step + 1, {**means, "lr": lr, "gradient_norm": norm}, batches, config)
                if world.is_main:
                    progress.set(step + 1, f"loss {means['loss']:.3f}")
            if (step + 1) % config.save_every == 0 or asked or last:
                _save(trainer, objective, loader, device, out, step + 1, config, world)
            if asked and not last:
                raise Interrupted(
                    f"{name} was asked to stop and is saved at step {step + 1} of {config.steps}",
                    cure="run the same command again to go on",
                )
    _write_model(trainer, model, config, shards, out, world)
    return {"steps": config.steps, "ranks": world.size, "zero_stage": config.zero.stage}


def _count(
    objective: Objective, batches: list[Batch], asked: bool, device: torch.device
) -> tuple[dict[str, float], bool]:
    """Counts of each term over the micro-batches of all ranks, and whether any rank was asked to stop."""
    mine = [objective.counts(batch) for batch in batches]
    *counts, stops = engine.total([*(sum(m[n] for m in mine) for n in objective.names), float(asked)], device)
    return dict(zip(objective.names, counts, strict=True)), stops > 0


def _means(
    terms: dict[str, Term], counts: dict[str, float], sums: torch.Tensor, device: torch.device
) -> dict[str, float]:
    """The loss and its terms, averaged over the whole step. `sums` stands in order of `counts`."""
    totals = engine.total(sums.tolist(), device)
    means = {f"loss_{n}": s / max(c, 1.0) for (n, c), s in zip(counts.items(), totals, strict=True)}
    return {"loss": sum(t.weight * means[f"loss_{n}"] for n, t in terms.items()), **means}


def probe_loss(trainer: engine.DeepSpeedEngine, objective: Objective, loader: Loader, device: torch.device) -> float:
    """Loss of the probe batch; every rank computes the same one."""
    with torch.no_grad(), trainer.evaluating():
        batch = loader.probe().to(device)
        loss = loss_of(objective(trainer.model, batch), objective.counts(batch))
    return float(loss)


def _save(
    trainer: engine.DeepSpeedEngine, objective: Objective, loader: Loader, device: torch.device,
    out: Path, step: int, config: LoopConfig, world: World,
) -> None:  # fmt: skip
    probe = probe_loss(trainer, objective, loader, device)
    tensors, scalars = trainer.state(), trainer.scalars()
    _on_main(lambda: checkpoint.save(out / "checkpoints", step, tensors, scalars, probe, config.keep), world)


def _on_main(write: Callable[[], None], world: World) -> None:
    """Let rank 0 write while the others wait; when it cannot (a full disk), every rank raises the same LaunchError."""
    problem: MmlmError | None = None
    if world.is_main:
        try:
            write()
        except OSError as error:
            problem = explain_os_error(error) or LaunchError(f"cannot write the checkpoint ({error})")
    told = engine.broadcast((problem.found, problem.cure) if problem else None)
    if told:
        raise LaunchError(told[0], cure=told[1])


def _resume(
    trainer: engine.DeepSpeedEngine, objective: Objective, loader: Loader, device: torch.device, out: Path, world: World
) -> int:
    """Load the newest intact checkpoint and prove it on the probe batch. Returns the step to go on with."""
    saved = checkpoint.newest(out / "checkpoints")
    if saved is None:
        return 0
    trainer.load(saved.tensors, saved.scalars)
    probe = probe_loss(trainer, objective, loader, device)
    if not math.isclose(probe, saved.probe, rel_tol=2e-2, abs_tol=1e-3):
        raise ArtifactError(
            f"the resumed model's loss on the probe batch is {probe:.6f}",
            wanted=f"{saved.probe:.6f}, as when step {saved.step} was saved",
            cure="remove the folder `checkpoints` to start over, and report this",
        )
    return saved.step


def _write_model(
    trainer: engine.DeepSpeedEngine, model: torch.nn.Module, config: LoopConfig, shards: Path, out: Path, world: World
) -> None:
    tensors = trainer.result()
    _on_main(lambda: weights.save_model(out, tensors, model.config, shards), world)  # type: ignore[arg-type]


class Log:
    """Rows of `metrics.jsonl`, from rank 0. Rows past the step that training resumes at are dropped first."""

    def __init__(self, path: Path, world: World, first: int) -> None:
        self.path, self.on = path, world.is_main
        self.clock, self.wait, self.tokens_from = time.perf_counter(), 0.0, first
        if self.on and path.exists():
            rows = [line for line in path.read_text().splitlines() if _step_of(line) <= first]
            path.write_text("".join(line + "\n" for line in rows))

    def waited(self, seconds: float) -> None:
        self.wait += seconds

    def write(self, step: int, metrics: dict[str, float], batches: list[Batch], config: LoopConfig) -> None:
        if not self.on:
            return
        seconds, steps = time.perf_counter() - self.clock, step - self.tokens_from
        metrics["samples_per_second"] = steps * config.data.batch / seconds
        metrics["data_wait"] = self.wait / seconds
        positions = sum(b.valid_BT.numel() for b in batches)
        metrics["padding"] = 1 - sum(int(b.valid_BT.sum()) for b in batches) / positions
        self.clock, self.wait, self.tokens_from = time.perf_counter(), 0.0, step
        row = json.dumps({"step": step, "time": int(time.time() * 1000), "metrics": metrics})
        with contextlib.suppress(OSError), self.path.open("a") as f:  # figures never stop the training
            f.write(row + "\n")


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line).get("step") or 0)
    except ValueError:
        return 1 << 62
