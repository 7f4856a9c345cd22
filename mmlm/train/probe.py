"""A look at this CPU before training on it: the real model on a real micro-batch, a few times, on one rank's cores."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from mmlm.data.collate import Batch
from mmlm.data.loader import Loader
from mmlm.data.reader import decoded_bytes
from mmlm.features.spec import FeatureSpec
from mmlm.model.baseline_config import AnyModelConfig
from mmlm.model.flops import Shape, forward_flops, training_flops
from mmlm.model.streams import SLOTS
from mmlm.train import weights
from mmlm.train.config import LoopConfig
from mmlm.train.objectives import Answering, Distilling, Objective, loss_of
from mmlm.train.planning import Measured, counted, learner
from mmlm.train.planning import count as size_of
from mmlm.train.terms.contrast import Contrast
from mmlm.train.workload import Corpus, Workload
from mmlm.world import World, cores

T = TypeVar("T")
R = TypeVar("R")

LARGEST = 300_000_000
"""Parameters of the largest model that is tried out."""
LOOKED_AT = 64
"""Samples whose decoded size is looked at."""
LONGEST = 5e10
"""FLOPs of the largest micro-batch that is tried out; a larger one is cut, and its time multiplied."""
REPEATS = 24
"""Micro-batches that are tried out at most, and"""
FEWEST = 6
"""at least. They differ: of 30 passes of `almanac` the slowest took twice as long as the fastest."""
ENOUGH = 3.0
"""Seconds after which FEWEST are enough."""


@dataclass(frozen=True)
class Teaching:
    """What distillation has beside the student."""

    model: AnyModelConfig
    """The teacher."""
    temperature: float
    task: float


def workload(loader: Loader, config: LoopConfig, sequences: int = 512) -> Workload:
    """What a step of this loader holds: the mean of its first steps, as many as make `sequences`."""
    steps = max(1, min(8, sequences // config.data.batch))
    batches = [loader.batch(step) for step in range(steps)]
    contrast = Contrast(config.loss.contrastive) if config.loss.contrastive else None
    shape = _mean([contrast.shape(batch) if contrast else Shape.of(batch) for batch in batches])
    views = _mean([contrast.shape_of_views(batch) for batch in batches]) if contrast else None
    rows, length = (round(statistics.mean(b.tokens_BT.shape[i] for b in batches)) for i in (0, 1))
    samples = [loader.maker.record(n) for n in np.linspace(0, len(loader.reader) - 1, LOOKED_AT).astype(int).tolist()]
    corpus = Corpus(
        samples=len(loader.reader), a_step=statistics.mean(len(batch.ids) for batch in batches),
        decoded=statistics.mean(map(decoded_bytes, samples)),
        mapped=0.0 if loader.reader.files.remote else loader.reader.shard_bytes, cache=loader.cache_bytes,
    )  # fmt: skip
    return Workload(shape, rows, length, f"the mean of {steps} batches of the shards", corpus, views)


def _mean(shapes: Sequence[Shape]) -> Shape:
    """A shape of every so many records of `shapes`, by their length, and with the mean of their figures."""
    each = [(s.lengths, s.prompts_or_rest, s.tags, *(s.among(name) for name in SLOTS)) for s in shapes]
    records = [record for columns in each for record in zip(*columns, strict=True)]
    chosen = sorted(records, reverse=True)[:: len(shapes)]
    lengths, prompts, tags, *media = zip(*chosen, strict=True) if chosen else ((),) * (3 + len(SLOTS))

    def mean(name: str) -> int:
        return round(statistics.mean(getattr(shape, name) for shape in shapes))

    figures = {name: mean(name) for name in ("targets", "answers", "patches", "mels", "read")}
    return Shape(lengths, prompts=prompts, tags=tags, media=dict(zip(SLOTS, media, strict=True)), **figures)


def threads(ranks: int) -> int:
    """Of one of `ranks` ranks on this machine: those that OMP_NUM_THREADS names, which ranks obey as well (torchrun sets 1),
    else its share of the cores."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdecimal() and int(given) else max(1, cores() // ranks)


def measure(
    config: LoopConfig, model: AnyModelConfig, spec: FeatureSpec, shards: Path, ranks: int, repeat: int = REPEATS,
    teacher: Teaching | None = None,
) -> Measured | None:  # fmt: skip
    """Seconds of a micro-batch, of its making and of the update on one of `ranks` ranks of this machine.

    None when the model is too large to be tried out.
    """
    whole = counted(config, model, spec)
    if max(whole.parameters, size_of(teacher.model, spec) if teacher else 0) > LARGEST:
        return None
    before = torch.get_num_threads()
    torch.set_num_threads(threads(ranks))
    state = torch.random.get_rng_state()
    try:
        return _measure(config, model, spec, shards, ranks, whole.trained, repeat, teacher)
    finally:
        torch.random.set_rng_state(state)
        torch.set_num_threads(before)


def _measure(
    config: LoopConfig, sizes: AnyModelConfig, spec: FeatureSpec, shards: Path, ranks: int, trained: int, repeat: int,
    teacher: Teaching | None,
) -> Measured:  # fmt: skip
    notes = []
    here = World(ranks - 1, ranks)
    loader = Loader(shards, config.data, config.seed, here, config.steps, quiet=True, pieces=config.accumulate)

    def make(step: int) -> Batch:
        return loader.batches(step, config.accumulate)[0]

    objective = _objective(config, sizes, spec, teacher)
    tried, whole = make, objective.shape(make(0))
    flops = training_flops(sizes, spec, whole)
    factor = max(1.0, (flops + (forward_flops(teacher.model, spec, whole) if teacher else 0)) / LONGEST)
    if factor > 1:
        smaller = config.data.model_copy(
            update={"batch": max(ranks, int(config.data.batch / config.accumulate / factor))}
        )
        tried = Loader(shards, smaller, config.seed, here, config.steps, quiet=True).batch
        factor = flops / training_flops(sizes, spec, objective.shape(tried(0)))
        notes.append(f"a micro-batch was tried out at 1/{factor:.0f} of its size")
    model = learner(config, sizes, spec)
    model.set_up(recompute=config.recompute, granularity=config.recompute_granularity)
    if config.precision == "bf16":
        model = model.bfloat16()
    pair = min(2, config.accumulate)  # what must be known of several micro-batches before costs a pass of each
    making: list[float] = []
    learning: list[float] = []
    for step in range(repeat + 1):  # each has shapes of its own
        seconds, batch = _timed(make, step)
        making.append(seconds)
        batch = batch if tried is make else tried(step)
        ahead, _ = _timed(lambda batch: objective.prepare(model, [batch] * pair, torch.device("cpu")), batch)
        seconds, _ = _timed(lambda batch: loss_of(objective(model, batch), objective.counts(batch)).backward(), batch)
        learning.append(seconds + ahead / pair)
        if step >= FEWEST and sum(making) + sum(learning) > ENOUGH:
            break
    again = [_timed(make, step)[0] for step in range(len(making))]  # from the cache of decoded samples
    return Measured(
        _slowest(learning[1:], ranks) * factor, _update(config, ranks, trained),
        statistics.median(making[1:]) / config.accumulate, statistics.median(again[1:]) / config.accumulate, notes,
    )  # fmt: skip


def _objective(config: LoopConfig, sizes: AnyModelConfig, spec: FeatureSpec, teacher: Teaching | None) -> Objective:
    if teacher is None:
        return Answering(config.loss, spec, sizes, across_ranks=False)  # each rank looks by itself
    leader = weights.build(teacher.model, spec).eval().requires_grad_(False)
    leader = leader.bfloat16() if config.precision == "bf16" else leader
    return Distilling(config.loss, spec, leader, teacher.temperature, teacher.task, sizes)


def _update(config: LoopConfig, ranks: int, trained: int) -> float:
    """Seconds to update one rank's part, as DeepSpeed does it: float32, in one piece, with the norm and the way back."""
    part = torch.zeros(trained // ranks if config.zero.stage else trained, requires_grad=True)
    part.grad = torch.zeros_like(part)
    optimizer = torch.optim.AdamW([part], foreach=True)
    low = torch.zeros(part.shape, dtype=torch.bfloat16)

    def update(_: int) -> None:
        assert part.grad is not None
        part.grad.copy_(low)
        part.grad.norm()
        part.grad.mul_(1.0)
        optimizer.step()
        low.copy_(part.detach())

    return statistics.median([_timed(update, number)[0] for number in range(FEWEST + 1)][1:])


def _slowest(seconds: list[float], ranks: int) -> float:
    """The mean of the slowest of `ranks`, each of which takes any of these times: the others wait for it in every step."""
    ordered, m = sorted(seconds), len(seconds)
    return sum(s * (((n + 1) / m) ** ranks - (n / m) ** ranks) for n, s in enumerate(ordered))


def _timed(call: Callable[[T], R], of: T) -> tuple[float, R]:
    start = time.perf_counter()
    made = call(of)
    return time.perf_counter() - start, made
