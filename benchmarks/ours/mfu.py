"""Share of a GPU's peak that a training step reaches (MFU): one GPU, bf16, full sequences of one record each. And what the
rest of the time goes to: a few steps more are profiled after those that are timed.

Published for one H100: 34.9 % at 760 M and 41.8 % at 1 B parameters. No peer runs beside it.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import numpy as np
import torch

from benchmarks.harness.measure import Log
from benchmarks.ours import what_is_left
from mmlm.data.collate import Batch, pack
from mmlm.data.config import DataConfig
from mmlm.features.sample import Sample
from mmlm.features.spec import FeatureSpec, TaskSpec
from mmlm.model.config import ModelConfig
from mmlm.model.flops import Shape, training_flops
from mmlm.model.transformer import FusedTransformer, count_parameters
from mmlm.train import engine
from mmlm.train.config import AdamWConfig, TrainConfig, ZeroConfig
from mmlm.train.objectives import Answering, loss_of
from mmlm.train.peak import peak_flops
from mmlm.world import World

SIZES = (("350 M", 1024, 24, 16, None), ("760 M", 1536, 24, 16, 0.50), ("1 B", 2048, 20, 16, 0.55))
"""Name, width, layers, heads, wanted MFU."""
LENGTHS = (2048, 8192)
TOKENS = 32_768
"""Of a step."""
VOCABULARY = 32_000
WARM, STEPS, PROFILED = 5, 20, 3


def on_gpu(runs: int, log: Log) -> list[dict[str, Any]]:
    """A row for each size and length; none, and a word about it, where there is no GPU."""
    if not torch.cuda.is_available():
        print("no CUDA device: nothing is measured", file=sys.stderr)
        return []
    rows = []
    for name, width, layers, heads, goal in SIZES:
        for length in LENGTHS:
            config = ModelConfig(width=width, layers=layers, heads=heads, kv_heads=heads, qk_norm=False)
            reached, left = zip(*(step_mfu(config, length) for _ in range(runs)), strict=True)
            log.note(f"{name} at {length}", mfu=reached, device=torch.cuda.get_device_name(), left=left)
            rows.append(
                {
                    "name": f"MFU, {name} at {length:,} positions", "unit": "share of the peak",
                    "ours": round(statistics.median(reached), 4), "peer": None, "peer_name": None, "ratio": None,
                    "goal": goal, "runs": runs, "reason": torch.cuda.get_device_name(),
                    "left": left[-1],
                }
            )  # fmt: skip
    return rows


def step_mfu(
    config: ModelConfig, length: int, device_type: str = "cuda", tokens: int = TOKENS
) -> tuple[float, dict[str, Any]]:
    """Median over steps of the FLOPs of a step, divided by its seconds and by the peak of the device; and what
    `what_is_left.look` finds in further steps."""
    device = engine.start(World())
    trainer, objective, batch = _training(config, length, tokens, device, compiled=device_type == "cuda")
    flops, counts = training_flops(config, _spec(length), Shape.of(batch)), objective.counts(batch)
    batch = batch.to(device)

    def step() -> float:
        begin = time.perf_counter()
        trainer.backward(loss_of(objective(trainer.model, batch), counts))
        trainer.update(1e-4)
        engine.wait(device)
        return time.perf_counter() - begin

    warm, steps = (WARM, STEPS) if device_type == "cuda" else (1, 2)
    seconds = [step() for _ in range(warm + steps)][warm:]
    reached = flops / statistics.median(seconds) / peak_flops(device, torch.bfloat16)
    left = what_is_left.look(step, PROFILED, device)
    print(f"{count_parameters(trainer.module):,} parameters, {length} positions: MFU {reached:.1%}", file=sys.stderr)
    print("\n".join(what_is_left.lines(left)), file=sys.stderr)
    return reached, left


def _spec(length: int) -> FeatureSpec:
    tasks = [TaskSpec(name="text", has_text=True)]
    return FeatureSpec(vocab_size=VOCABULARY, tokenizer_digest="none", max_len=length, tasks=tasks)


def _training(
    config: ModelConfig, length: int, tokens: int, device: torch.device, compiled: bool
) -> tuple[engine.DeepSpeedEngine, Answering, Batch]:
    """A model that is ready to be trained, its objective, and a batch on the host."""
    spec, sequences = _spec(length), max(1, tokens // length)
    torch.manual_seed(0)
    model = FusedTransformer(config, spec).to(device)
    model.set_up(compiled=compiled)
    settings = TrainConfig(optimizer=AdamWConfig(lr=1e-4), zero=ZeroConfig(stage=1), data=DataConfig(batch=sequences))
    draw = np.random.default_rng(0)
    pieces = [
        Sample(str(n), "text", draw.integers(9, VOCABULARY, length).astype(np.int32), -1) for n in range(sequences)
    ]
    batch = pack([[piece] for piece in pieces], spec, length)
    return engine.DeepSpeedEngine(model, settings, World()), Answering(settings.loss, spec), batch
