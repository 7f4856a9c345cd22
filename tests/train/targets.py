"""What test ranks run: hangs of two kinds, a training with poisoned records, one look at the validation split."""

from __future__ import annotations

import ctypes
import math
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from mmlm import world as worlds
from mmlm.config import parse
from mmlm.data.collate import Batch
from mmlm.data.loader import Loader
from mmlm.features import spec as feature_spec
from mmlm.storage import write_json
from mmlm.train import engine, validation, weights
from mmlm.train.config import TrainConfig
from mmlm.train.control import START_SECONDS, Stop, Where
from mmlm.train.loop import fit
from mmlm.train.objectives import Answering
from mmlm.train.session import Session
from mmlm.train.terms.term import Term
from mmlm.train.train import write_counts
from mmlm.train.validation import Validation
from mmlm.train.watchdog import Watchdog


def hang(out: str, seconds: float, locked: bool) -> None:
    """Rank 0 waits for rank 1, which comes no more: it sleeps, or holds the interpreter's lock while it does."""
    world = worlds.from_environment()
    with Stop(Where()), Watchdog(seconds, Path(out) / "logs", world, "train") as dog:
        for step in range(3):
            dog.beat(f"step {step + 1}")
            time.sleep(seconds / 4)
        _stuck(locked and world.rank == 1)


def _stuck(locked: bool) -> None:
    if locked:
        ctypes.PyDLL(None).sleep(600)
    time.sleep(600)


class Poisoned(Answering):
    """Answering, but the loss of a batch that holds one of `ids` is `loss`."""

    ids: frozenset[str] = frozenset()
    loss = math.nan

    def __call__(self, model: torch.nn.Module, batch: Batch) -> dict[str, Term]:
        terms = super().__call__(model, batch)
        if self.ids & set(batch.ids):
            terms["answer"] = terms["answer"]._replace(sum=terms["answer"].sum * self.loss)
        return terms


def train_poisoned(
    config: dict[str, Any], shards: str, out: str, ids: list[str], loss: float, hang: float = 1800.0
) -> None:
    settings = parse(TrainConfig, config, "train")
    engine.start(worlds.from_environment())
    torch.manual_seed(settings.seed)
    spec = feature_spec.load(Path(shards))
    model = weights.build(settings.model, spec)
    objective = Poisoned(settings.loss, spec)
    objective.ids, objective.loss = frozenset(ids), loss
    counts = fit(model, objective, settings, Path(shards), Path(out), "train", Where(ledger=True, hang_seconds=hang))
    write_counts(Path(out), counts, model)
    engine.stop()


class Slow(Answering):
    """Answering that takes `inside` seconds more for each forward pass, and `beside` seconds to count its targets."""

    inside = beside = 0.0

    def __call__(self, model: torch.nn.Module, batch: Batch) -> dict[str, Term]:
        time.sleep(self.inside)
        return super().__call__(model, batch)

    def counts(self, batch: Batch) -> dict[str, float]:
        time.sleep(self.beside)
        return super().counts(batch)


def train_slowly(config: dict[str, Any], shards: str, out: str, inside: float, beside: float, look: float) -> None:
    """A training by `Slow`, each of whose passes at validation takes `look` seconds more."""
    settings = parse(TrainConfig, config, "train")
    engine.start(worlds.from_environment())
    spec = feature_spec.load(Path(shards))
    model = weights.build(settings.model, spec)
    model.register_forward_pre_hook(lambda module, _: None if module.training else time.sleep(look))
    objective = Slow(settings.loss, spec)
    objective.inside, objective.beside = inside, beside
    fit(model, objective, settings, Path(shards), Path(out), "train", Where())
    engine.stop()


def slow_looks(config: dict[str, Any], shards: str, out: str, chunk: float, hang: float) -> None:
    """A look by a model that takes `chunk` seconds for each pass without gradients, under a watchdog of `hang` seconds;
    then, for steps up to the one after which a look is due, whether a time limit that leaves no room for it is too near."""
    settings = parse(TrainConfig, config, "train")
    world = worlds.from_environment()
    device = engine.start(world)
    folder = Path(shards)
    model = weights.build(settings.model, feature_spec.load(folder))
    model.register_forward_pre_hook(lambda module, _: None if module.training else time.sleep(chunk))
    trainer = engine.DeepSpeedEngine(model, settings, world)
    with (
        closing(Loader(folder, settings.data, settings.seed, world, settings.steps)) as loader,
        Watchdog(hang, Path(out) / "logs", world, "train") as dog,
    ):
        objective, where = Answering(settings.loss, loader.reader.spec), Where(hang_seconds=hang)
        validation.CHUNK = 4
        session = Session(
            trainer, objective, loader, settings, folder, Path(out), "train", where, world, device, dog.beat
        )
        every = settings.validation.every
        session.validate(every)
        look = session.validation.seconds
        asked = {}
        for step in range(every):
            left = START_SECONDS + 1.5 * session.save_seconds + look / 2
            with Stop(Where(deadline=time.time() + left)) as stop:
                asked[step] = session.wants_to_stop(stop, step)
    write_json(Path(out) / "asked.json", {"look": look, "chunks": len(session.validation.chunks), "asked": asked})
    engine.stop()


def look(config: dict[str, Any], shards: str, out: str) -> None:
    """One look at the validation split with an untrained model; its values go to `out`/val-RANKS.json from every rank."""
    settings = parse(TrainConfig, config, "train")
    world = worlds.from_environment()
    device = engine.start(world)
    torch.manual_seed(settings.seed)
    model = weights.build(settings.model, feature_spec.load(Path(shards)))
    trainer = engine.DeepSpeedEngine(model, settings, world)
    values = Validation(Path(shards), settings, world, device).run(trainer, 1)
    write_json(Path(out) / f"val-{world.size}-{world.rank}.json", values)
    engine.stop()
