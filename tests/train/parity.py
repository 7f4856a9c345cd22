"""Training under DeepSpeed on real ranks beside forty lines of plain PyTorch, for the parity tests.

Batches are made to hurt: in some steps the second half of the records (rank 1 of 2) has no picture, no sound or neither,
in others no record has any; some records have no label, one micro-batch has no token to learn from at all, and one holds
no more than a piece of a record.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from mmlm import world as worlds
from mmlm.config import parse
from mmlm.data.collate import IGNORE, Batch, collate
from mmlm.errors import ConfigError
from mmlm.features.sample import Sample
from mmlm.features.spec import ANSWER, EOS, FIELDS
from mmlm.model.transformer import FusedTransformer
from mmlm.train import engine, weights
from mmlm.train.config import TrainConfig
from mmlm.train.objectives import Answering, loss_of
from mmlm.train.schedule import learning_rate
from mmlm.train.terms.one_label import class_masks, own_classes
from tests.small import SPEC, sample

STEPS, RECORDS = 20, 8
BASE: dict[str, Any] = {
    "steps": STEPS,
    "precision": "fp32",
    "model": {"width": 32, "layers": 2, "heads": 4, "attention": "prefix"},
    "data": {"batch": RECORDS},
    "optimizer": {"lr": 3e-3, "clip": 1.0},
}
LEAST = 1e-3
"""Share of the whole norm up to which a parameter is rounding: it is compared relative to that. Of the reference's gradients
the smallest is 2e-3 of the whole where it is not 0."""
GIVEN: list[list[tuple[str, ...]]] = [
    [("image", "audio", "fields")] * 8,
    [("image", "audio")] * 4 + [("image",)] * 4,
    [("image", "audio", "context")] * 4 + [("audio",)] * 4,
    [("image", "fields")] * 4 + [()] * 4,
    [()] * 8,
    [(), ("audio",), (), (), ("image",), (), ("fields",), ("image", "audio")],
]
"""What the records of step n give, n modulo 6."""


class Trained(NamedTuple):
    losses: list[float]
    gradients: list[dict[str, torch.Tensor]]
    """Per step, after clipping."""
    states: dict[str, dict[str, torch.Tensor]]
    """At the end, by kind and name."""


def records(step: int) -> list[Sample]:
    made = [
        sample(100 * step + i, given, task="free" if i in (1, 4) else "kind") for i, given in enumerate(GIVEN[step % 6])
    ]
    for i in (6, 7) if step % 4 == 1 else ():  # the last micro-batch of four records has nothing to learn from
        made[i].tokens = np.array([*made[i].tokens[: made[i].answer_at], ANSWER, EOS], np.int32)[:-1]
        made[i].label = None
    if step % 4 == 3:  # a piece of a long record: no question, no label, every next token is a target
        made[2] = Sample(f"p{step}", "free", made[2].tokens[made[2].tokens > FIELDS], answer_at=-1)
    return made


def settings(changes: dict[str, Any]) -> TrainConfig:
    return parse(TrainConfig, {**BASE, **changes}, "test")


def build(config: TrainConfig) -> FusedTransformer:
    torch.manual_seed(3)
    encodes = getattr(config.model, "layout", "decoder") == "encoder"  # which has classes alone
    model = weights.build(config.model, SPEC.model_copy(update={"tasks": SPEC.tasks[:1]}) if encodes else SPEC)
    model.set_up(recompute=config.recompute, granularity=config.recompute_granularity)
    return model


def loss_of_all(model: FusedTransformer, step: int) -> torch.Tensor:
    """The loss of the whole global batch in one piece."""
    batch = collate(records(step), SPEC)
    targets = batch.target_BT[batch.target_BT != IGNORE]
    output = model(batch)
    logits_RC = own_classes(output.label_RC, batch.task_R, class_masks(SPEC))
    answer = F.cross_entropy(output.answer_AV, targets, reduction="sum") / len(targets) * model.generates
    labelled = (batch.label_R != IGNORE).sum()
    label = F.cross_entropy(logits_RC, batch.label_R, ignore_index=IGNORE, reduction="sum") / labelled
    guess = output.modality
    if guess is None:
        return answer + label
    return answer + label + F.cross_entropy(guess.logits, guess.kind_Z) * model.config.fusion.weight  # type: ignore


def reference(config: TrainConfig, steps: int) -> Trained:
    """Plain PyTorch in one process: torch's AdamW, its clipping, one batch a step."""
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
        model.progress = step / config.steps
        loss = loss_of_all(model, step)
        optimizer.zero_grad(set_to_none=False)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config.steps, config.optimizer.lr, config.schedule)
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
        losses.append(loss.item())
    return Trained(losses, gradients, {"weight": {n: p.detach() for n, p in model.named_parameters()}})


def textbook(config: TrainConfig, steps: int) -> Trained:
    """The rules that PyTorch lacks, written down parameter by parameter: Lion, Muon, factors, freezing, the average."""
    model = build(config)
    matrices = [f"{n}.weight" for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    named = dict(model.named_parameters())
    state = {n: [torch.zeros_like(p), torch.zeros_like(p), 0] for n, p in named.items()}
    average = {n: p.detach().clone() for n, p in named.items()}
    losses, gradients = [], []
    for step in range(steps):
        loss = loss_of_all(model, step)
        found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        frozen = {
            n
            for n in named
            for f in config.freeze
            if n.startswith(f.modules) and f.start <= step and (f.end is None or step < f.end)
        }
        grad = {
            n: torch.zeros_like(p) if g is None or n in frozen else g
            for (n, p), g in zip(named.items(), found, strict=True)
        }
        norm = torch.stack([g.norm() for g in grad.values()]).norm()
        grad = {n: g / max(1.0, float(norm) / config.optimizer.clip) for n, g in grad.items()}
        rate = learning_rate(step, config.steps, config.optimizer.lr, config.schedule)
        for n, p in named.items():
            with torch.no_grad():
                factor = next((f for start, f in config.lr_factors.items() if n.startswith(start)), 1.0)
                decay = config.optimizer.weight_decay if n in matrices else 0.0
                if n not in frozen:
                    change = _change(config, n, n in matrices, grad[n], state[n])
                    p.mul_(1 - rate * factor * decay).sub_(rate * factor * change)
                keep = min(config.ema.decay if config.ema else 0.0, (2 + step) / (11 + step))
                average[n] = keep * average[n] + (1 - keep) * p
        losses.append(loss.item())
        gradients.append(grad)
    states = {"weight": {n: p.detach() for n, p in named.items()}}
    return Trained(losses, gradients, states | ({"ema": average} if config.ema else {}))


def _change(config: TrainConfig, name: str, matrix: bool, g: torch.Tensor, state: list[Any]) -> torch.Tensor:
    kind = config.optimizer.kind
    if kind == "lion":
        direction = (0.9 * state[0] + 0.1 * g).sign()
        state[0] = 0.99 * state[0] + 0.01 * g
        return direction
    if kind == "muon" and matrix and name.startswith("blocks"):
        state[0] = 0.95 * state[0] + 0.05 * g
        update = 0.05 * g + 0.95 * state[0]
        parts = 4 + 2 * 2 if "qkv" in name else 2 if "gate_up" in name else 1
        return torch.cat([_newton_schulz(x) * 0.2 * max(x.shape) ** 0.5 for x in update.chunk(parts)])
    state[0], state[1], state[2] = 0.9 * state[0] + 0.1 * g, 0.95 * state[1] + 0.05 * g * g, state[2] + 1
    mean, square = state[0] / (1 - 0.9 ** state[2]), state[1] / (1 - 0.95 ** state[2])
    return mean / (square.sqrt() + 1e-8)


def _newton_schulz(x: torch.Tensor) -> torch.Tensor:
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        small = x @ x.T if x.shape[0] <= x.shape[1] else x.T @ x
        factor = -4.7750 * small + 2.0315 * small @ small
        x = 3.4445 * x + (factor @ x if x.shape[0] <= x.shape[1] else x @ factor)
    return x


class Run:
    """One training of the engine on this rank."""

    def __init__(self, changes: dict[str, Any]) -> None:
        self.config, self.world = settings(changes), worlds.from_environment()
        self.objective = Answering(self.config.loss, SPEC, self.config.model)
        self.device = engine.device_of(self.world)
        self.trainer = engine.DeepSpeedEngine(build(self.config).to(self.device), self.config, self.world)
        self.gradients: dict[str, torch.Tensor] = {}
        self.trainer.rules.register_step_pre_hook(self._note_gradients)

    def step(self, step: int) -> tuple[float, float]:
        """Loss and gradient norm of one step."""
        self.trainer.module.progress = step / self.config.steps  # type: ignore[assignment]
        batches = self.batches(step)
        counts = dict.fromkeys(self.objective.names, 0.0)
        for batch, name in itertools.product(batches, counts):
            counts[name] += self.objective.counts(batch)[name]
        summed = engine.total(list(counts.values()), self.device)
        counts = dict(zip(counts, summed, strict=True))
        loss = 0.0
        for batch in batches:
            part = loss_of(self.objective(self.trainer.model, batch), counts)
            self.trainer.backward(part)
            loss += float(part.detach())
        self.gradients = {}
        rate = learning_rate(step, self.config.steps, self.config.optimizer.lr, self.config.schedule)
        norm = self.trainer.update(rate)
        return engine.total([loss], self.device)[0], norm

    def batches(self, step: int) -> list[Batch]:
        mine = np.array_split(np.arange(RECORDS), self.world.size)[self.world.rank]
        all_records = records(step)
        return [
            collate([all_records[i] for i in cut], SPEC).to(self.device)
            for cut in np.array_split(mine, self.config.accumulate)
        ]

    def close(self) -> None:
        self.trainer.model.destroy()

    def _note_gradients(self, optimizer: Any, *_: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                share = self.trainer.rules.shares[parameter]
                for number, whole in share.wholes(parameter.grad):
                    self.gradients[share.runs[number].name] = whole.cpu().clone()


def start(world: worlds.World) -> str:
    """Join the ranks. DeepSpeed wants a CPU with AVX-512 FP16 for fp16; any computes in it, slowly, which will do here.

    Returns how the engine refuses fp16 on a processor without it.
    """
    engine.start(world)
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: False
    try:
        Run({"precision": "fp16"})
    except ConfigError as error:
        said = str(error)
    get_accelerator().is_fp16_supported = lambda: True
    return said


def compare(out: str, combinations: list[dict[str, Any]], steps: int) -> None:
    """On every rank: train each combination, and let rank 0 note its losses and how far gradients and states are off.

    A combination is {config, and if wanted: load and save: names of files in `out`, first: step to begin at,
    steps: step to end before}.
    """
    torch.set_num_threads(1)
    world = worlds.from_environment()
    start(world)
    rows: list[dict[str, Any]] = []
    known: dict[str, Trained] = {}
    for combination in combinations:
        run, last = Run(combination["config"]), combination.get("steps", steps)
        wanted = _wanted(known, run.config, last)
        exact = True
        if "load" in combination:
            exact = _load(run, Path(out, combination["load"]))
        losses, whole, each = [], [], []
        for step in range(combination.get("first", 0), last):
            losses.append(run.step(step)[0])
            if run.gradients:
                whole.append(distance(run.gradients, wanted.gradients[step]))
                each.append(furthest(run.gradients, wanted.gradients[step]))
            else:  # fp16 leaves steps out whose scaled gradients are too large
                assert run.config.precision == "fp16", f"no gradient was seen in step {step}"
        state = run.trainer.state()
        if world.is_main:
            apart = {kind: distance(state[kind], wanted.states[kind]) for kind in wanted.states}
            expected = wanted.losses[-len(losses) :]
            row = {"losses": losses, "expected": expected, "gradient": max(whole), "each": max(each)}
            rows.append({**row, "states": apart, "exact": exact})
            if "save" in combination:
                torch.save({"state": state, "scalars": run.trainer.scalars()}, Path(out, combination["save"]))
        run.close()
    Path(out, f"rank-{world.rank}.json").write_text(json.dumps(rows))
    engine.stop()


def _wanted(known: dict[str, Trained], config: TrainConfig, steps: int) -> Trained:
    keys = ("optimizer", "schedule", "model", "lr_factors", "freeze", "ema")
    key = json.dumps([steps, *(config.model_dump(mode="json")[k] for k in keys)])
    if key not in known:
        plain = config.optimizer.kind == "adamw" and not (config.lr_factors or config.freeze or config.ema)
        known[key] = reference(config, steps) if plain else textbook(config, steps)
    return known[key]


def _load(run: Run, path: Path) -> bool:
    """Load what another training saved. Whether all of it can be read back bit by bit."""
    saved = torch.load(path, weights_only=True)
    run.trainer.load(saved["state"], saved["scalars"])
    again = run.trainer.state()
    same = all(
        torch.equal(again[kind][name], tensor)
        for kind, named in (saved["state"].items() if run.world.is_main else ())
        for name, tensor in named.items()
    )
    return same and run.trainer.scalars() == saved["scalars"]


def guard(out: str, settings: list[dict[str, Any]], overflowing: list[dict[str, Any]]) -> None:
    """On every rank: what `_poisoned` and `_overflowing` note about each of their settings."""
    torch.set_num_threads(1)
    world = worlds.from_environment()
    refused = start(world)
    notes = {"refused": refused, "poisoned": _poisoned(world, settings), "overflowing": _overflowing(overflowing)}
    Path(out, f"rank-{world.rank}.json").write_text(json.dumps(notes))
    engine.stop()


def _poisoned(world: worlds.World, settings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A step, one whose gradient is no number on the last rank, one that is discarded, and one more good step."""
    notes = []
    for changes in settings:
        run = Run(changes)
        run.step(0)
        before, counted = run.trainer.state(), run.trainer.updates
        poison = float("nan") if world.rank == world.size - 1 else 1.0
        for batch in run.batches(1):
            run.trainer.backward(
                loss_of(run.objective(run.trainer.model, batch), {"answer": 8.0, "label": 8.0}) * poison
            )
        norm = run.trainer.update(1e-3)
        for batch in run.batches(1):
            run.trainer.backward(loss_of(run.objective(run.trainer.model, batch), {"answer": 8.0, "label": 8.0}))
        run.trainer.discard()
        after = run.trainer.state()
        same = all(torch.equal(after[k][n], t) for k, named in before.items() for n, t in named.items())
        loss, good = run.step(1)
        notes.append(
            {
                "changes": changes, "norm": norm, "same": same, "loss": loss, "good": good,
                "counts": [run.trainer.updates - counted, run.trainer.skipped, run.trainer.taken],
            }
        )  # fmt: skip
        run.close()
    return notes


def _overflowing(settings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """fp16 from a loss scale that is far too high: each step's norm, whether it overflowed, and the scale after it."""
    notes = []
    for changes in settings:
        run, steps = Run(changes), []
        for step in range(14):
            norm = run.step(step)[1]
            steps.append([norm, run.trainer.overflowed, run.trainer.scalars()["scaler.cur_scale"]])
        notes.append({"steps": steps, "skipped": run.trainer.skipped})
        run.close()
    return notes


def distance(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Largest difference, relative to the norm of the whole (all parameters as one vector)."""
    apart, sizes = _norms(found, wanted)
    return float(apart.norm() / sizes.norm())


def furthest(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Largest difference of any one tensor, relative to its own norm, or to `LEAST` of the whole where that is more."""
    apart, sizes = _norms(found, wanted)
    return float((apart / sizes.clamp_min(float(LEAST * sizes.norm()))).max())


def _norms(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each tensor that was found: the norm of its difference, and of what was wanted (0 where nothing was)."""
    missing = set(wanted) - set(found)
    assert found and not missing, missing
    aims = {
        name: wanted[name].detach() if name in wanted else torch.zeros_like(tensor) for name, tensor in found.items()
    }
    apart = torch.stack([(tensor - aims[name]).norm() for name, tensor in found.items()])
    return apart, torch.stack([aim.norm() for aim in aims.values()])
