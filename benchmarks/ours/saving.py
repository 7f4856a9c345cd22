"""A rank of a training that is saved in each form, and by DeepSpeed itself: what a step waits, and when it is on the disk."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from mmlm import world as worlds
from mmlm.data.collate import collate
from mmlm.features.sample import Sample
from mmlm.features.spec import FeatureSpec, TaskSpec
from mmlm.model.config import ModelConfig
from mmlm.train import engine
from mmlm.train.config import TrainConfig
from mmlm.train.keeper import Keeper
from mmlm.train.objectives import Answering, loss_of
from mmlm.train.proof import Part
from mmlm.train.weights import build
from mmlm.world import World

SPEC = FeatureSpec(vocab_size=4096, tokenizer_digest="", max_len=64, tasks=[TaskSpec(name="text")])


def on_rank(model: dict[str, Any], stage: int, rounds: int, out: str) -> None:
    world = worlds.from_environment()
    device = engine.start(world)
    torch.set_num_threads(1)
    config = TrainConfig.model_validate({"model": model, "zero": {"stage": stage}, "keep": 1})
    trainer = engine.DeepSpeedEngine(build(ModelConfig(**model), SPEC), config, world)
    objective = Answering(config.loss, SPEC)
    ids = torch.randint(8, SPEC.vocab_size, (4, 48)).int().numpy()
    batch = collate([Sample("", "text", row, -1) for row in ids], SPEC).to(device)

    def step() -> float:
        began = time.perf_counter()
        counts = {name: value * world.size for name, value in objective.counts(batch).items()}
        trainer.backward(loss_of(objective(trainer.model, batch), counts))
        trainer.update(1e-4)
        return time.perf_counter() - began

    step()
    found: dict[str, list[dict[str, float]]] = {}
    for number in range(rounds):
        for form in ("full", "sharded", "deepspeed"):
            row = one(form, number + 1, Path(out, form), config, world, trainer, device)
            found.setdefault(form, []).append({**row, "step": step()})
            engine.total([0.0], device)  # nobody goes on before all are here
            if world.is_main:
                shutil.rmtree(Path(out, form))
            engine.total([0.0], device)
    if world.is_main:
        Path(out, "found.json").write_text(json.dumps(found))


def one(
    form: str, step: int, folder: Path, config: TrainConfig, world: World, trainer: engine.DeepSpeedEngine, device: Any
) -> dict[str, float]:  # fmt: skip
    """Seconds of saving in one form and of going on, of this rank."""
    engine.total([0.0], device)
    keeper = Keeper(
        folder, config.model_copy(update={"checkpoint_format": form}), world, trainer, no_probe, {}, device
    ) if form != "deepspeed" else None  # fmt: skip
    began = time.perf_counter()
    if keeper:
        keeper.save(step, {}, wait=False)
    else:
        trainer.model.save_checkpoint(str(folder), tag="one")
    waited = time.perf_counter() - began
    if keeper:
        keeper.finish()
    engine.total([0.0], device)
    safe = time.perf_counter() - began
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if world.is_main else 0
    began = time.perf_counter()
    if keeper:
        saved = keeper.newest()
        assert saved is not None
        trainer.load(saved.tensors(), saved.state["scalars"])
    else:
        trainer.model.load_checkpoint(str(folder), tag="one")
    engine.total([0.0], device)
    return {"waited": waited, "safe": safe, "bytes": size, "loaded": time.perf_counter() - began}


def no_probe(parts: int) -> list[Part]:
    """Nothing of the data: what is measured is the saving."""
    return [Part(0.0, ("",)) for _ in range(parts)]
