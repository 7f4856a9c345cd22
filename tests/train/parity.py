"""Training under DeepSpeed on real ranks beside forty lines of plain PyTorch, for the parity tests.

Batches are made to hurt: in some steps the second half of the records (rank 1 of 2) has no picture, no sound or neither,
in others no record has any; some records have no label, and one micro-batch has no token to learn from at all.
"""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from mmlm import world as worlds
from mmlm.config import parse
from mmlm.data.collate import IGNORE, Batch, collate
from mmlm.features.sample import Sample
from mmlm.features.spec import ANSWER, EOS
from mmlm.model.transformer import FusedTransformer
from mmlm.train import engine, weights
from mmlm.train.config import TrainConfig
from mmlm.train.objectives import Answering, class_masks, loss_of, own_classes
from mmlm.train.schedule import learning_rate
from tests.small import SPEC, sample

STEPS, RECORDS = 20, 8
BASE: dict[str, Any] = {
    "steps": STEPS,
    "precision": "fp32",
    "model": {"width": 32, "layers": 2, "heads": 4, "attention": "prefix"},
    "data": {"batch": RECORDS},
    "optimizer": {"lr": 3e-3, "clip": 1.0},
}
GIVEN: list[list[tuple[str, ...]]] = [
    [("image", "audio", "fields")] * 8,
    [("image", "audio")] * 4 + [("image",)] * 4,
    [("image", "audio", "context")] * 4 + [("audio",)] * 4,
    [("image", "fields")] * 4 + [()] * 4,
    [()] * 8,
    [(), ("audio",), (), (), ("image",), (), ("fields",), ("image", "audio")],
]
"""What the records of step n give, n modulo 6."""


def records(step: int) -> list[Sample]:
    made = [
        sample(100 * step + i, given, task="free" if i in (1, 4) else "kind") for i, given in enumerate(GIVEN[step % 6])
    ]
    for i in (6, 7) if step % 4 == 1 else ():  # the last micro-batch of four records has nothing to learn from
        made[i].tokens = np.array([*made[i].tokens[: made[i].answer_at], ANSWER, EOS], np.int32)[:-1]
        made[i].label = None
    return made


def settings(changes: dict[str, Any]) -> TrainConfig:
    return parse(TrainConfig, {**BASE, **changes}, "test")


def build(config: TrainConfig) -> FusedTransformer:
    torch.manual_seed(3)
    return weights.build(config.model, SPEC)


def reference(config: TrainConfig, steps: int = STEPS) -> dict[str, Any]:
    """The same training in plain PyTorch, in one process and in one piece: losses, gradients, weights."""
    model = build(config)
    decayed = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
    others = [p for p in model.parameters() if all(p is not d for d in decayed)]
    groups = [
        {"params": decayed, "weight_decay": config.optimizer.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    losses, gradients = [], []
    for step in range(steps):
        batch = collate(records(step), SPEC)
        targets = batch.target_BT[batch.target_BT != IGNORE]
        output = model(batch)
        logits_RC = own_classes(output.label_RC, batch.task_R, class_masks(SPEC))
        answer = F.cross_entropy(output.answer_AV, targets, reduction="sum") / len(targets)
        labelled = (batch.label_R != IGNORE).sum()
        label = F.cross_entropy(logits_RC, batch.label_R, ignore_index=IGNORE, reduction="sum") / labelled
        optimizer.zero_grad()
        (answer + label).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config.steps, config.optimizer.lr, config.schedule)
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
        losses.append(float(answer + label))
    return {"losses": losses, "gradients": gradients, "weights": dict(model.named_parameters())}


class Run:
    """One training of the engine on this rank."""

    def __init__(self, changes: dict[str, Any]) -> None:
        self.config, self.world = settings(changes), worlds.from_environment()
        self.objective = Answering(self.config.loss, SPEC)
        self.trainer = engine.DeepSpeedEngine(build(self.config), self.config, self.world)
        self.gradients: dict[str, torch.Tensor] = {}
        self.trainer.rules.register_step_pre_hook(self._note_gradients)

    def step(self, step: int) -> tuple[float, float]:
        """Loss and gradient norm of one step."""
        batches = self.batches(step)
        counts = dict.fromkeys(self.objective.names, 0.0)
        for batch, name in itertools.product(batches, counts):
            counts[name] += self.objective.counts(batch)[name]
        summed = engine.total(list(counts.values()), torch.device("cpu"))
        counts = dict(zip(counts, summed, strict=True))
        loss = 0.0
        for batch in batches:
            part = loss_of(self.objective(self.trainer.model, batch), counts)
            self.trainer.backward(part)
            loss += float(part)
        self.gradients = {}
        rate = learning_rate(step, self.config.steps, self.config.optimizer.lr, self.config.schedule)
        norm = self.trainer.update(rate)
        return engine.total([loss], torch.device("cpu"))[0], norm

    def batches(self, step: int) -> list[Batch]:
        mine = np.array_split(np.arange(RECORDS), self.world.size)[self.world.rank]
        all_records = records(step)
        return [collate([all_records[i] for i in cut], SPEC) for cut in np.array_split(mine, self.config.accumulate)]

    def close(self) -> None:
        self.trainer.model.destroy()

    def _note_gradients(self, optimizer: Any, *_: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                share = self.trainer.rules.shares[parameter]
                for number, whole in share.wholes(parameter.grad):
                    self.gradients[share.runs[number].name] = whole.clone()


def start(world: worlds.World) -> None:
    """Join the ranks. DeepSpeed wants a CPU with AVX-512 FP16 for fp16; any computes in it, slowly, which will do here."""
    engine.start(world)
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True


def compare(out: str, combinations: list[dict[str, Any]], steps: int) -> None:
    """On every rank: train each combination for `steps`, and note its losses and how far its gradients are off."""
    torch.set_num_threads(1)
    world = worlds.from_environment()
    start(world)
    rows: list[dict[str, Any]] = []
    references: dict[str, dict[str, Any]] = {}
    for changes in combinations:
        run = Run(changes)
        key = json.dumps([run.config.model_dump(mode="json")[k] for k in ("optimizer", "schedule", "model")])
        wanted = references.setdefault(key, reference(run.config, steps) if key not in references else {})
        losses, worst = [], 0.0
        for step in range(steps):
            losses.append(run.step(step)[0])
            worst = max(worst, distance(run.gradients, wanted["gradients"][step]))
        final = run.trainer.state()
        rows.append({"changes": changes, "losses": losses, "expected": wanted["losses"], "gradient": worst})
        rows[-1]["weight"] = distance(final["weight"], wanted["weights"]) if world.is_main else 0.0
        run.close()
    Path(out, f"rank-{os.environ['RANK']}.json").write_text(json.dumps(rows))
    engine.stop()


def distance(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Largest difference, relative to the norm of the whole (all parameters as one vector)."""
    missing = set(wanted) - set(found)
    assert not missing, missing
    size = torch.stack([w.detach().norm() for w in wanted.values()]).norm()
    zeros = [v.norm() for n, v in found.items() if n not in wanted]
    apart = torch.stack([(found[n] - w.detach()).norm() for n, w in wanted.items()] + zeros).norm()
    return float(apart / size)
