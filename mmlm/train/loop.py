"""The loop: what every rank runs, for training and for distillation alike."""

from __future__ import annotations

import functools
import math
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from mmlm import world as worlds
from mmlm.data.collate import Batch
from mmlm.data.loader import Loader
from mmlm.data.order import key_of
from mmlm.errors import Interrupted
from mmlm.progress import Progress
from mmlm.train import checkpoint, engine
from mmlm.train.config import LoopConfig
from mmlm.train.control import Stop, Where
from mmlm.train.keeper import FOLDER
from mmlm.train.objectives import Objective, loss_of
from mmlm.train.schedule import learning_rate
from mmlm.train.session import Session
from mmlm.train.terms.term import Term
from mmlm.train.watchdog import Watchdog


def fit(
    model: torch.nn.Module,
    objective: Objective,
    config: LoopConfig,
    shards: Path,
    out: Path,
    name: str,
    where: Where | None = None,
) -> dict[str, float]:
    """Train `model` for `config.steps` steps from the newest checkpoint below `out`; write its weights into `out`.

    Every rank calls it. Appends rows `{"step", "time", "metrics"}` to `out/metrics.jsonl` from rank 0. Raises
    Interrupted after saving when a signal, a time limit or a file asked to stop, DataError when bad steps come back
    after roll-backs, ArtifactError when the newest checkpoint is not of this training.
    """
    where, world = where or Where(), worlds.from_environment()
    device = engine.device_of(world)
    begun = functools.partial(Loader, plan=checkpoint.data_of(out / FOLDER).get("pack"), pieces=config.accumulate)
    with (
        Stop(where) as stop,
        Watchdog.of_start(where.hang_seconds, out / "logs", world, name) as watchdog,
        closing(begun(shards, config.data, config.seed, world, config.steps, pin=device.type == "cuda")) as loader,
    ):
        engine.broadcast(None)  # all ranks have planned
        watchdog.beat("its start")
        with Progress(name, config.steps, "steps") as progress:
            trainer = engine.DeepSpeedEngine(model.to(device), config, world)
            session = Session(
                trainer, objective, loader, config, shards, out, name, where, world, device, watchdog.beat
            )
            clock = session.telemetry.clock
            step = session.resume()
            progress.resume_at(step)
            while step < config.steps and not session.validation.over:
                watchdog.beat(f"step {step + 1}")
                session.telemetry.begin()
                with clock.phase("data"):
                    batches = loader.batches(step, config.accumulate)
                counts, asked = _count(objective, batches, session.wants_to_stop(stop, step), device)
                figures: dict[str, float] = {}
                if not session.passes_over(step, batches):
                    figures, bad = _take(session, step, batches, counts)
                    session.note(step, batches, figures, bad)
                if session.guard.spoiled:
                    step = session.roll_back()
                    continue
                step += 1
                if figures:
                    session.log(step, figures, progress)
                session.validate(step)
                over = step == config.steps or session.validation.over
                session.save(step, due=asked or over, wait=asked or over)
                if asked and not over:
                    raise _stopped(name, step, config, stop)
            if engine.total([float(stop.asked)], device)[0]:  # in the last step: writing the model may take too long
                raise _stopped(name, step, config, stop)
            counts = session.finish(step)
    if stop.asked and world.is_main:  # what comes next would know nothing of it
        raise _stopped(name, step, config, stop)
    return counts


def _stopped(name: str, step: int, config: LoopConfig, stop: Stop) -> Interrupted:
    return Interrupted(
        f"{name} was asked to stop and is saved at step {step} of {config.steps}{stop.why}",
        cure="run the same command again to go on",
    )


def _take(session: Session, step: int, batches: list[Batch], counts: dict[str, float]) -> tuple[dict[str, float], str]:
    """Forward, backward and update of one step. Returns its figures, and what is wrong with it when nothing was updated."""
    config, trainer, objective, device = session.config, session.trainer, session.objective, session.device
    compute = functools.partial(session.telemetry.clock.phase, "compute")  # and nothing of our own in it
    torch.manual_seed(_seed(config.seed, step, session.world.rank))
    module: Any = trainer.module
    module.progress = step / config.steps
    sums = torch.zeros(len(objective.names), device=device)
    with compute():
        objective.prepare(trainer.model, batches, device)
    for batch in batches:
        there = batch.to(device)
        with compute():
            terms = objective(trainer.model, there)
            trainer.backward(loss_of(terms, counts))
        sums += torch.stack([terms[n].sum.detach().float() for n in objective.names])
        session.telemetry.count(batch, terms, objective.shape(batch))
    with compute():
        engine.wait(device)  # the figures would wait for it
    means = _means(terms, counts, sums, device)
    lr = learning_rate(step, config.steps, config.optimizer.lr, config.schedule)
    bad = session.guard.judge(means["loss"])
    with compute():
        if bad:
            trainer.discard()
        norm = math.nan if bad else trainer.update(lr)
    session.telemetry.end()
    return {**means, "lr": lr, "gradient_norm": norm}, bad


def _seed(seed: int, step: int, rank: int) -> int:
    """Of a step's dropout: it follows from the step, as its batch does, so an attempt that goes on draws the same masks."""
    return int(key_of(seed, 3, step, rank)[0]) & (2**63 - 1)


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
