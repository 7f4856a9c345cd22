"""Validation: the held-out split while training, with what its records give; early stop; which checkpoint is best.

The records are cut into chunks once, whatever the number of ranks; a chunk is worked on by one rank, and its sums are
added up in order of the chunks, so that every number of ranks gives the same value from the same weights.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmlm.data.collate import IGNORE, collate
from mmlm.data.loader import CACHE_BYTES
from mmlm.data.reader import ShardReader
from mmlm.errors import ConfigError, DataError
from mmlm.features.sample import Sample
from mmlm.progress import tell
from mmlm.train import engine
from mmlm.train.config import LoopConfig
from mmlm.train.objectives import Answering
from mmlm.train.terms.one_label import own_classes
from mmlm.world import World

CHUNK = 32
"""Records of one forward pass."""


class Validation:
    """`due(step)`, `run(trainer)`; remembers the best value and for how long there was no better one."""

    def __init__(self, shards: Path, config: LoopConfig, world: World, device: torch.device) -> None:
        self.config, self.world, self.device = config.validation, world, device
        self.best: float | None = None
        """The lowest score: the loss, or 1 - accuracy."""
        self.best_step, self.stale = 0, 0
        self.seconds = 0.0
        """Of the longest look so far."""
        self.improved = False
        """Whether the last look was better than all before."""
        if self.config.every:
            self._open(shards, config)

    def _open(self, shards: Path, config: LoopConfig) -> None:
        self.reader = ShardReader(shards, ("val",), CACHE_BYTES)
        if not len(self.reader):
            raise DataError(
                f"{shards} has no records for validation",
                cure="give scan.yaml a `split` with `val`, or validation.every=0",
            )
        # embeddings of a few records at a time are no measure of how they will be found among all
        self.objective = Answering(config.loss.model_copy(update={"contrastive": None}), self.reader.spec)
        self._told: set[int] = set()
        """Damaged samples that were told of."""
        order = np.random.default_rng((0, 7)).permutation(len(self.reader))
        chosen = np.sort(order[: self.config.records])
        self.chunks = [chosen[at : at + CHUNK] for at in range(0, len(chosen), CHUNK)]
        self._require_counted(config.keep_best)

    def _require_counted(self, keep_best: int) -> None:
        """Raises ConfigError where no record counts for the metric: it would stay the same, and the first look the best."""
        accuracy = self.config.metric == "label_accuracy"
        if not accuracy and not (self.config.patience or self.config.export == "best" or keep_best):
            return  # nothing is chosen by it
        weights = self.objective.weights
        read = 0
        for samples in map(self._intact, self.chunks):
            read += len(samples)
            counts = self.objective.counts(collate(samples, self.reader.spec)) if samples else {}
            counted = ["label"] if accuracy else [name for name in counts if weights[name]]
            if any(counts.get(name) for name in counted):
                return
        if not read:
            return  # all are damaged, which the first look tells
        if accuracy:
            raise ConfigError(
                f"validation.metric: label_accuracy, and none of the {read} records for validation has one class of a list",
                wanted="records with a label, of a task where one class holds", cure="give validation.metric: loss",
            )  # fmt: skip
        raise ConfigError(
            f"validation.metric: loss, and nothing of the {read} records for validation counts in the loss",
            wanted="a term with a weight other than 0, beside the contrastive one, which validation leaves out",
            cure="give loss.answer a weight, or leave validation.patience, export: best and keep_best away",
        )

    @property
    def over(self) -> bool:
        """Whether training should stop early."""
        return bool(self.config.patience) and self.stale >= self.config.patience

    def due(self, step: int) -> bool:
        """Whether to look after `step` steps."""
        return self.config.every > 0 and step % self.config.every == 0

    def expected(self, step_seconds: float, batch: int) -> float:
        """Seconds of a look. Until one was seen, as many as that many records take in steps of `batch` sequences, which hold
        a record or more and are learnt from as well."""
        if self.seconds or not self.config.every:
            return self.seconds
        rounds = -(-len(self.chunks) // self.world.size)
        return step_seconds * rounds * self.world.size * CHUNK / batch

    def run(
        self, trainer: engine.DeepSpeedEngine, step: int, beat: Callable[[str, float], None] | None = None
    ) -> dict[str, float]:
        """Loss and accuracy of the class head after `step` steps, by their names in `metrics.jsonl`. `beat` is told of
        every chunk, and of how long the wait for the other ranks may be."""
        began = time.monotonic()
        names = [*self.objective.names, "right"]
        sums = np.zeros((len(self.chunks), 2 * len(names)))
        rounds = -(-len(self.chunks) // self.world.size)
        with torch.no_grad(), trainer.evaluating():
            for number in range(self.world.rank, rounds * self.world.size, self.world.size):
                # under ZeRO-3 all ranks pass all layers together: who has no chunk left works one for nothing
                if beat:
                    beat(f"validation after step {step}, chunk {number + 1} of {len(self.chunks)}", 0.0)
                real = number < len(self.chunks)
                found = self._chunk(trainer.model, self.chunks[number if real else 0])
                if real:
                    sums[number] = [part for name in names for part in found[name]]
        if beat:
            beat(f"validation after step {step}, waiting for all ranks", time.monotonic() - began)
        totals = np.array(engine.total(sums.ravel().tolist(), self.device)).reshape(sums.shape).sum(0)
        means = {name: totals[2 * n] / max(totals[2 * n + 1], 1.0) for n, name in enumerate(names)}
        weights = self.objective.weights
        values = {f"val/loss_{name}": float(means[name]) for name in self.objective.names}
        values = {"val/loss": sum(weights[n] * means[n] for n in self.objective.names), **values}
        values["val/label_accuracy"] = float(means["right"])
        self._note(values, step)
        self.seconds = max(self.seconds, time.monotonic() - began)
        return values if self.best is None else {**values, "val/best": self.best}

    def _chunk(self, model: torch.nn.Module, numbers: np.ndarray) -> dict[str, tuple[float, float]]:
        """name → (sum, count)."""
        samples = self._intact(numbers)
        batch = collate(samples or [self._any()], self.reader.spec).to(self.device)
        output = model(batch, z_loss=self.objective.z_share)  # a large vocabulary: no whole logits here neither
        counts = self.objective.counts(batch)
        found = {n: (float(t.sum), counts[n]) for n, t in self.objective.terms(output, batch).items()}
        logits_RC = own_classes(output.label_RC.float(), batch.task_R, self.objective.label.allowed)
        labelled = batch.label_R != IGNORE
        right = (logits_RC.argmax(-1) == batch.label_R) & labelled
        found |= {"right": (float(right.sum()), float(labelled.sum()))}
        return found if samples else dict.fromkeys(found, (0.0, 0.0))

    def _intact(self, numbers: Iterable[int]) -> list[Sample]:
        """The samples, without damaged ones: raising on the one rank that reads them would leave the others waiting."""
        samples = []
        for n in map(int, numbers):
            try:
                samples.append(self.reader[n])
            except DataError as error:
                if n not in self._told:
                    self._told.add(n)
                    tell(f"validation: {self.reader.place(n)} is damaged ({error.found}) and left out")
        return samples

    def _any(self) -> Sample:
        """What stands where a whole chunk is damaged: it counts nothing, but all ranks pass all layers."""
        for n in range(len(self.reader)):
            for sample in self._intact([n]):
                return sample
        raise DataError("no record for validation can be read", cure="run `mmlm verify` on the shard set")

    def _note(self, values: dict[str, float], step: int) -> None:
        score = self.score(values)
        self.improved = score is not None and (self.best is None or score < self.best)
        if self.improved:
            self.best, self.best_step, self.stale = score, step, 0
        else:
            self.stale += 1

    def score(self, values: dict[str, float]) -> float | None:
        """The metric as something to make small; None when it is no number, and so never the best."""
        value = values[f"val/{self.config.metric}"]
        if not math.isfinite(value):
            return None
        return value if self.config.metric == "loss" else 1.0 - value

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"best": self.best, "best_step": self.best_step, "stale": self.stale}

    def load(self, state: dict[str, Any]) -> None:
        self.best, self.best_step, self.stale = state["best"], state["best_step"], state["stale"]
