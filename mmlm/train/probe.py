"""A look at this CPU before training on it: the real model on a real micro-batch, a few times, on one rank's cores."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from mmlm.data.collate import Batch
from mmlm.data.loader import Loader
from mmlm.features.spec import FeatureSpec
from mmlm.model.flops import Shape, training_flops
from mmlm.train import weights
from mmlm.train.config import LoopConfig, TrainConfig
from mmlm.train.objectives import Answering, loss_of
from mmlm.train.planning import Measured, Workload, count
from mmlm.world import World, cores

LARGEST = 300_000_000
"""Parameters of the largest model that is tried out."""
LONGEST = 5e10
"""FLOPs of the largest micro-batch that is tried out; a larger one is cut, and its time multiplied."""


def workload(loader: Loader, config: LoopConfig, sequences: int = 512) -> Workload:
    """What a step of this loader holds: the mean of its first steps, as many as make `sequences`."""
    steps = max(1, min(8, sequences // config.data.batch))
    batches = [loader.batch(step) for step in range(steps)]
    shapes = [Shape.of(batch) for batch in batches]
    records = [pair for shape in shapes for pair in zip(shape.lengths, shape.prompts_or_rest, strict=True)]
    lengths, prompts = zip(*sorted(records, reverse=True)[:: len(shapes)], strict=True)

    def mean(name: str) -> int:
        return round(statistics.mean(getattr(shape, name) for shape in shapes))

    figures = {name: mean(name) for name in ("targets", "answers", "patches", "mels", "read")}
    shape = Shape(lengths, prompts=prompts, **figures)
    rows, length = (round(statistics.mean(b.tokens_BT.shape[i] for b in batches)) for i in (0, 1))
    return Workload(shape, rows, length, f"the mean of {steps} batches of the shards")


def measure(config: TrainConfig, spec: FeatureSpec, shards: Path, ranks: int, repeat: int = 3) -> Measured | None:
    """Seconds of a micro-batch, of its making and of the update on one of `ranks` ranks of this machine.

    None when the model is too large to be tried out.
    """
    P = count(config.model, spec)
    if P > LARGEST:
        return None
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, cores() // ranks))
    state = torch.random.get_rng_state()
    try:
        return _measure(config, spec, shards, ranks, P, repeat)
    finally:
        torch.random.set_rng_state(state)
        torch.set_num_threads(before)


def _measure(config: TrainConfig, spec: FeatureSpec, shards: Path, ranks: int, P: int, repeat: int) -> Measured:
    notes = []
    loader = Loader(shards, config.data, config.seed, World(ranks - 1, ranks), config.steps)  # not main: it is silent
    made: list[Batch] = []

    def make(step: int) -> None:
        made[:] = loader.batches(step, config.accumulate)

    data = _median(make, repeat) / config.accumulate
    batch, flops = made[0], training_flops(config.model, spec, Shape.of(made[0]))
    factor = max(1.0, flops / LONGEST)
    if factor > 1:
        smaller = config.data.model_copy(
            update={"batch": max(ranks, int(config.data.batch / config.accumulate / factor))}
        )
        batch = Loader(shards, smaller, config.seed, World(ranks - 1, ranks), config.steps).batch(0)
        factor = flops / training_flops(config.model, spec, Shape.of(batch))
        notes.append(f"a micro-batch was tried out at 1/{factor:.0f} of its size")
    model = weights.build(config.model, spec)
    if config.precision == "bf16":
        model = model.bfloat16()
    objective = Answering(config.loss, spec, getattr(config.model, "fusion", None))
    counts = objective.counts(batch)

    def learn(_: int) -> None:
        loss_of(objective(model, batch), counts).backward()

    forward_backward = _median(learn, repeat) * factor
    return Measured(forward_backward, _update(config, ranks, P, repeat), data, notes)


def _update(config: TrainConfig, ranks: int, P: int, repeat: int) -> float:
    """Seconds to update one rank's part, as DeepSpeed does it: float32, in one piece, with the norm and the way back."""
    part = torch.zeros(P // ranks if config.zero.stage else P, requires_grad=True)
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

    return _median(update, repeat)


def _median(call: Callable[[int], None], repeat: int) -> float:
    """Seconds of a call, the first left out."""
    seconds = []
    for number in range(repeat + 1):
        start = time.perf_counter()
        call(number)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])
