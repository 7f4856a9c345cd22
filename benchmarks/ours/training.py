"""The loop of `train` on texts, one record a sequence: DeepSpeed ZeRO 2, bf16 with float32 master weights, AdamW.

Lap `work` is a number of whole steps after some others: reading, batches, forward, backward, optimizer, telemetry.
"""

from __future__ import annotations

import json
import os
import statistics
from pathlib import Path
from typing import Any

import torch

from benchmarks.ours.pictures import ALONE
from benchmarks.peers.clock import Watch, contest
from mmlm.corpus.config import Ask, ScanConfig, SplitConfig, TableMap, TableSource
from mmlm.corpus.scan import scan
from mmlm.data.collate import Batch
from mmlm.data.config import DataConfig
from mmlm.features import spec as feature_spec
from mmlm.features.config import FeaturesConfig, TokenizerConfig
from mmlm.model.config import ModelConfig
from mmlm.model.flops import Shape
from mmlm.model.transformer import count_parameters
from mmlm.shards.config import ShardConfig
from mmlm.shards.shard import shard
from mmlm.train import engine, weights
from mmlm.train.config import AdamWConfig, TrainConfig
from mmlm.train.loop import fit
from mmlm.train.objectives import Answering, Objective
from mmlm.train.terms.term import Term
from mmlm.world import World


class Timed:
    """An objective that starts the clock at the forward pass of step `first` and stops it at that of step `last`."""

    def __init__(self, inner: Answering, watch: Watch, first: int, last: int) -> None:
        self.inner, self.names, self.first, self.last = inner, inner.names, first, last
        self.lap = watch.lap("work")
        self.steps, self.tokens, self.losses = 0, 0.0, []  # type: ignore[var-annotated]

    def counts(self, batch: Batch) -> dict[str, float]:
        return self.inner.counts(batch)

    def prepare(self, model: torch.nn.Module, batches: list[Batch], device: torch.device) -> None:
        self.inner.prepare(model, batches, device)

    def __call__(self, model: torch.nn.Module, batch: Batch) -> dict[str, Term]:
        if not model.training:  # the probe batch of a checkpoint
            return self.inner(model, batch)
        if self.steps == self.first:
            self.lap.__enter__()
        elif self.steps == self.last:
            self.lap.__exit__(None, None, None)
        if self.first <= self.steps < self.last:
            self.tokens += self.inner.counts(batch)["answer"]
        self.steps += 1
        terms = self.inner(model, batch)
        self.losses.append(terms["answer"].sum.item() / self.inner.counts(batch)["answer"])
        return terms

    def shape(self, batch: Batch) -> Shape:
        return self.inner.shape(batch)

    def alone(self) -> Objective:
        return self.inner.alone()


def texts(source: Path, out: Path) -> Path:
    """A shard set of docs.jsonl, every token of which is an answer's."""
    ask = Ask(task="text", text="id", answer="{text}")
    scanning = ScanConfig(
        sources=[TableSource(kind="table", files=["docs.jsonl"], split="train", map=TableMap(id="id"), ask=[ask])],
        split=SplitConfig(val=0, test=0, fill=False),
    )
    features = FeaturesConfig(max_len=1 << 14, tokenizer=TokenizerConfig(file=str(source / "tokenizer.json")))
    manifest = scan(scanning, data=source, out=out / "manifest")
    sharding = ShardConfig(features=features, shard_records=1000, ray_from=ALONE)
    return shard(sharding, manifest, data=source, out=out / "shards").path


def work(source: Path, out: Path, options: dict[str, Any], watch: Watch) -> dict[str, Any]:
    torch.set_num_threads(options["threads"])
    warm, steps = (1, 1) if out.name == "warm" else (options["warm"], options["steps"])
    os.environ["MMLM_DATA_WORKERS"] = "0"
    os.environ["MASTER_PORT"] = str(20_000 + os.getpid() % 10_000)  # several may run at once
    shards = texts(source, out)
    config = TrainConfig(
        steps=warm + steps + 1, precision="bf16", save_every=1 << 30, log_every=1, data=DataConfig(batch=options["batch"]),
        optimizer=AdamWConfig(lr=3e-4), model=ModelConfig(**options["model"]),
    )  # fmt: skip
    engine.start(World())
    torch.manual_seed(0)
    spec = feature_spec.load(shards)
    model = weights.build(config.model, spec)
    parameters = count_parameters(model)
    objective = Timed(Answering(config.loss, spec), watch, warm, warm + steps)
    fit(model, objective, config, shards, out, "train")
    if out.name != "warm":
        engine.stop()
    rows = [json.loads(line)["metrics"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {
        "items": objective.tokens, "parameters": parameters, "losses": [round(x, 4) for x in objective.losses],
        "outside": statistics.median(row["outside"] for row in rows[warm:-1]),
        "mfu_flops": statistics.median(row["tflops"] for row in rows[warm:-1]),
    }  # fmt: skip


if __name__ == "__main__":
    contest(work)
