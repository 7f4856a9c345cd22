"""Share of a GPU's peak that a training step reaches (MFU): one GPU, bf16, full sequences of one record each.

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
from mmlm.data.collate import pack
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
WARM, STEPS = 5, 20


def on_gpu(runs: int, log: Log) -> list[dict[str, Any]]:
    """A row for each size and length; none, and a word about it, where there is no GPU."""
    if not torch.cuda.is_available():
        print("no CUDA device: nothing is measured", file=sys.stderr)
        return []
    rows = []
    for name, width, layers, heads, goal in SIZES:
        for length in LENGTHS:
            config = ModelConfig(width=width, layers=layers, heads=heads, kv_heads=heads, qk_norm=False)
            reached = [step_mfu(config, length) for _ in range(runs)]
            log.note(f"{name} at {length}", mfu=reached, device=torch.cuda.get_device_name())
            rows.append(
                {
                    "name": f"MFU, {name} at {length:,} positions", "unit": "share of the peak",
                    "ours": round(statistics.median(reached), 4), "peer": None, "peer_name": None, "ratio": None,
                    "goal": goal, "runs": runs, "reason": torch.cuda.get_device_name(),
                }
            )  # fmt: skip
    return rows


def step_mfu(config: ModelConfig, length: int, device_type: str = "cuda", tokens: int = TOKENS) -> float:
    """Median over steps of the FLOPs of a step, divided by its seconds and by the peak of the device."""
    world = World()
    device = engine.start(world)
    spec = FeatureSpec(
        vocab_size=VOCABULARY, tokenizer_digest="none", max_len=length, tasks=[TaskSpec(name="text", has_text=True)]
    )
    torch.manual_seed(0)
    model = FusedTransformer(config, spec).to(device)
    model.set_up(compiled=device_type == "cuda")
    settings = TrainConfig(
        optimizer=AdamWConfig(lr=1e-4), zero=ZeroConfig(stage=1), data=DataConfig(batch=max(1, tokens // length)),
    )  # fmt: skip
    trainer, objective = engine.DeepSpeedEngine(model, settings, world), Answering(settings.loss, spec)
    draw = np.random.default_rng(0)
    pieces = [
        Sample(str(n), "text", draw.integers(9, VOCABULARY, length).astype(np.int32), -1)
        for n in range(max(1, tokens // length))
    ]
    batch = pack([[piece] for piece in pieces], spec, length)
    flops, counts = training_flops(config, spec, Shape.of(batch)), objective.counts(batch)
    batch = batch.to(device)
    seconds = []
    for _ in range(WARM + STEPS if device_type == "cuda" else 3):
        begin = time.perf_counter()
        trainer.backward(loss_of(objective(trainer.model, batch), counts))
        trainer.update(1e-4)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    peak = peak_flops(device, torch.bfloat16)
    print(f"{count_parameters(model):,} parameters, {length} positions", file=sys.stderr)
    return flops / statistics.median(seconds[WARM if device_type == "cuda" else 1 :]) / peak
