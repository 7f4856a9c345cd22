"""Telemetry: where the seconds go, how fast, how full, how good; to `metrics.jsonl` and the terminal, from rank 0.

data_wait           share of the time that was spent waiting for batches, by the rank that waited longest: the others wait for it
outside             share outside forward, backward and optimizer (validation left out: it is forward passes)
tokens_per_second   real tokens, padding left out; positions include it
mfu                 operations that the model needs (those of views for the contrastive term included, but once), by
                    `training_flops`, over what all ranks' devices could do
loss_given/image    mean loss of the answers' tokens in records that give a picture and no sound, and so on
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from mmlm.data.collate import IGNORE, Batch
from mmlm.features.spec import AUDIO, IMAGE, FeatureSpec
from mmlm.model.baseline_config import AnyModelConfig
from mmlm.model.flops import NOTHING, Shape, training_flops
from mmlm.train import engine
from mmlm.train.memory import Trimmer, resident_bytes
from mmlm.train.peak import peak_flops
from mmlm.train.terms.term import Term
from mmlm.world import World

GIVEN = ("text", "image", "audio", "image+audio")
"""What a record gives beside text, by its number."""


class Clock:
    """Seconds of each phase of the steps since the last reset."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self.began = time.perf_counter()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.spent[name] = self.spent.get(name, 0.0) + time.perf_counter() - begin

    def reset(self) -> tuple[float, dict[str, float]]:
        """Seconds since the last reset, and those of each phase among them."""
        now = time.perf_counter()
        seconds, spent = now - self.began, self.spent
        self.began, self.spent = now, {}
        return max(seconds, 1e-9), spent


class Telemetry:
    """Figures of a training. Every rank counts and calls `row`; rank 0 writes."""

    frozen = NOTHING
    """How much of the weights has no gradient."""

    def __init__(
        self, out: Path, world: World, device: torch.device, precision: str, model: AnyModelConfig, spec: FeatureSpec
    ) -> None:
        self.path, self.world, self.device = out / "metrics.jsonl", world, device
        self.config, self.spec = model, spec
        self.peak = peak_flops(device, torch.float32 if precision == "fp32" else torch.bfloat16)
        self.clock = Clock()
        self._trimmer = Trimmer()
        self.longest = 0.0
        """Seconds of the longest step, saves and validation left out."""
        self._cpu = time.process_time()
        self._each: list[tuple[torch.Tensor, torch.Tensor]] = []
        """Kind and loss of each target since the last row; the losses stay where they are until then."""
        self._reset()
        self._step_began = time.perf_counter()

    def _reset(self) -> None:
        """Nothing was counted yet since the last row."""
        self._steps = 0
        self._tokens = self._positions = self._records = self._flops = 0.0
        self._each.clear()

    def rewind(self, step: int) -> None:
        """Training goes on after `step` steps: drop the rows of later ones, and what was counted for the next."""
        if self.world.is_main and self.path.exists():
            rows = [line for line in self.path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
            temporary = self.path.with_name(self.path.name + ".tmp")
            temporary.write_text("".join(line + "\n" for line in rows), encoding="utf-8")
            temporary.replace(self.path)
        self._reset()
        self.clock.reset()
        self._cpu = time.process_time()

    def begin(self) -> None:
        """A step begins."""
        self._step_began = time.perf_counter()

    def count(self, batch: Batch, terms: Mapping[str, Term], shape: Shape) -> None:
        """One micro-batch of this rank, still on the CPU, its terms, and what it asked of the model: further views of its
        records cost operations, but are no tokens of it."""
        self._tokens += float((batch.segment_BT >= 0).sum())
        self._positions += batch.valid_BT.numel()
        self._records += len(batch.ids)
        self._flops += training_flops(self.config, self.spec, shape, frozen=self.frozen)
        each_A = getattr(terms.get("answer"), "each", None)
        if each_A is not None:
            self._each.append((given_of_targets(batch), each_A.detach()))

    def end(self) -> None:
        """A step ended."""
        self._steps += 1
        self.longest = max(self.longest, time.perf_counter() - self._step_began)

    def row(self, step: int, values: dict[str, float]) -> dict[str, float]:
        """Write the figures since the last row beside `values`. Returns all of them."""
        seconds, spent = self.clock.reset()
        cpu, self._cpu = time.process_time() - self._cpu, time.process_time()
        self._trimmer.look(self._steps)
        memory = [*resident_bytes(), self._cuda_bytes()]
        mine = [self._tokens, self._positions, self._records, self._flops, cpu, *memory]
        waits = [spent.get("data", 0.0) if rank == self.world.rank else 0.0 for rank in range(self.world.size)]
        tokens, positions, records, flops, cpu, rss, own, cuda, *rest = engine.total(
            [*mine, *self._by_given(), *waits], self.device
        )
        given, waits = rest[: -self.world.size], rest[-self.world.size :]  # each rank's own, since only it was added
        training = max(seconds - spent.get("validation", 0.0), 1e-9)
        figures = {
            **values,
            **{
                f"loss_given/{name}": given[n] / given[n + len(GIVEN)]
                for n, name in enumerate(GIVEN)
                if given[n + len(GIVEN)]
            },
            "tokens_per_second": tokens / training,
            "samples_per_second": records / training,
            "tflops": flops / training / 1e12,
            "mfu": flops / training / (self.peak * self.world.size),
            "padding": 1 - tokens / max(positions, 1.0),
            "data_wait": min(max(waits) / training, 1.0),
            "outside": 1 - spent.get("compute", 0.0) / training,
            "step_seconds": training / max(self._steps, 1),
            "cpu_seconds": cpu,
            "memory_rss_bytes": rss,
            "memory_own_bytes": own,
        }
        if cuda:
            figures["memory_cuda_bytes"] = cuda
        self._reset()
        self.write(step, figures)
        return figures

    def _by_given(self) -> list[float]:
        """Summed loss of the targets of each kind in GIVEN, then their numbers; those without a finite loss left out."""
        if not self._each:
            return [0.0] * 2 * len(GIVEN)
        kinds = torch.cat([kind_A for kind_A, _ in self._each])
        losses = torch.cat([each_A for _, each_A in self._each]).double().cpu()
        finite = losses.isfinite()
        kinds, losses = kinds[finite], losses[finite]
        sums = torch.bincount(kinds, losses, len(GIVEN))
        return [*sums.tolist(), *torch.bincount(kinds, minlength=len(GIVEN)).tolist()]

    def write(self, step: int, values: dict[str, float]) -> None:
        """One row, from rank 0; what is no number is left out of it."""
        if self.world.is_main:
            numbers = {name: value for name, value in values.items() if math.isfinite(value)}
            row = json.dumps({"step": step, "time": int(time.time() * 1000), "metrics": numbers})
            # figures never stop the training
            with contextlib.suppress(OSError), self.path.open("a", encoding="utf-8") as f:
                f.write(row + "\n")

    def _cuda_bytes(self) -> float:
        return float(torch.cuda.max_memory_allocated(self.device)) if self.device.type == "cuda" else 0.0


def given_of_targets(batch: Batch) -> torch.Tensor:
    """(A,) int64: what the record of each target gives, as its number in GIVEN."""
    B = len(batch.segment_BT)
    S = int(batch.segment_BT.max()) + 1
    rows_B1 = torch.arange(B, device=batch.segment_BT.device)[:, None]
    record_BT = rows_B1 * S + batch.segment_BT.clamp_min(0)
    kinds = torch.zeros(B * S, dtype=torch.int64, device=record_BT.device)
    kinds[record_BT[batch.tokens_BT == IMAGE]] += 1  # an index counts once, however often it stands there
    kinds[record_BT[batch.tokens_BT == AUDIO]] += 2
    return kinds[record_BT[batch.target_BT != IGNORE]]


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line).get("step") or 0)
    except ValueError:
        return 1 << 62
