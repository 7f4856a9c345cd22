"""What a training will take, before it starts: parameters, memory of each rank, seconds of each step.

Memory is a sum of named parts. N ranks, P parameters (below `weights`: that are trained), b bytes of the working precision (2,
or 4 for fp32):

| part | stage 0 | 1 | 2 | 3 |
|---|---|---|---|---|
| weights | bP | bP | bP | bP/N and what is gathered |
| gradients | bP | bP | bP/N | bP/N |
| master weights and optimizer states (AdamW: 12, Lion: 8 bytes) | 12P | 12P/N | 12P/N | 12P/N |
| float32 gradients of the update | 4P | 4P/N | 4P/N | 4P/N |

Stage 0 in fp32 has no master weights and no gradients but the model's own. Before all that, every rank builds the whole model in
float32 in the host's memory and moves it to its device, at every stage: `start`, 4P bytes.

(Rajbhandari et al. 2020, section 3, and DeepSpeed 0.19's buffers.) Activations are counted tensor by tensor from the
model's own code; tests/train/test_planning.py holds them against what autograd really keeps, and the sum against the
resident memory of real ranks.

Time of a step = arithmetic at the rate that the device reaches + what moves through memory + what moves between ranks
(nothing overlaps here, as in our engine) + the update. On a CPU the first two are measured (mmlm/train/probe.py).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch

from mmlm.features.spec import FeatureSpec
from mmlm.model import adapters
from mmlm.model.baseline_config import AnyModelConfig
from mmlm.model.config import ModelConfig
from mmlm.model.cross_entropy import LOGITS
from mmlm.model.flops import Frozen, Shape, forward_flops, training_flops
from mmlm.model.hog import moved_bytes
from mmlm.train import weights
from mmlm.train.activations import activation_bytes, low_bytes
from mmlm.train.config import LoopConfig
from mmlm.train.devices import HOST_BANDWIDTH, NODE_LINK, PCIE_REACHED, Device
from mmlm.train.groups import frozen_share, let_rest
from mmlm.train.memory import SLACK, SLACK_SHARE
from mmlm.train.saved_tensors import is_sharded
from mmlm.train.workload import Workload

BUCKET = 50_000_000
"""Elements of DeepSpeed's reduction and gathering buffers, as in train/engine.py."""
LIVE = 1_000_000_000
"""Parameters that stage 3 keeps gathered before it lets go of the first (DeepSpeed's default)."""
BASE = 628 << 20
"""Resident bytes of a rank on a CPU: torch 2.13, deepspeed and pyarrow (207 MB of files, 280 of its own) and 128 compiled
kernels."""
HOLES = 100 << 20
"""Bytes of pages that a step on a CPU touches beyond its activations at most, since these lie elsewhere in every step;
activations of up to 2/3 of that take as much and half again. `almanac`, 60 MB at once, holds 170 MB more after a step than
after the trim before it."""
MEETING = 12e-3
"""Seconds that ranks on one CPU spend a step in the eight collectives of it, beyond what is sent: 1 ms to 3 ms each."""
CONTEXT = 1.2e9
"""Bytes of a GPU that its runtime, nccl and the allocator's holes take; an assumption."""
PROCESS = 3.0e9
"""Bytes of the host's memory that a rank with CUDA's libraries loaded takes; an assumption."""
ENGINE = 0.25e-3
"""Seconds that DeepSpeed's own hooks and copies take for each parameter tensor and step on a CPU; 6 ms for 23 tensors,
measured as processor time on a busy machine."""
KERNELS = 60
"""Kernels of a block in forward and backward, uncompiled; five times as many for all that is no block."""


@dataclass(frozen=True)
class Forecast:
    """What one choice of device, ranks and ZeRO stage would take."""

    device: str
    ranks: int
    stage: int
    parameters: int
    memory: dict[str, float]
    """Bytes of the device by part, at the fullest moment of one rank; on a CPU of its process."""
    host: dict[str, float]
    """Bytes of the host's memory by part, for all ranks of one node."""
    seconds: dict[str, float]
    """Of one step, by part."""
    tokens: int
    """Real positions of a step, without those of views."""
    flops: int
    """Of a step, all ranks, recomputation not counted."""
    peak: float
    fits: bool
    steps: int
    start: float = 0.0
    """Bytes of the device when the whole model has come to it, before it is cut."""
    host_start: float = 0.0
    """Bytes of the host's memory then, for all ranks of one node."""

    @property
    def held(self) -> float:
        """Bytes in the steps."""
        return sum(self.memory.values())

    @property
    def bytes(self) -> float:
        """At the fullest moment, the start included."""
        return max(self.held, self.start)

    @property
    def host_bytes(self) -> float:
        return max(sum(self.host.values()), self.host_start)

    @property
    def machines(self) -> int:
        """Devices that are paid for: ranks on a CPU share it."""
        return 1 if self.device == "cpu" else self.ranks

    @property
    def step(self) -> float:
        return sum(self.seconds.values())

    @property
    def hours(self) -> float:
        return self.step * self.steps / 3600

    @property
    def mfu(self) -> float:
        return self.flops / self.step / (self.peak * self.machines)

    def row(self, price: float | None) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {
            "bytes": self.bytes, "host_bytes": self.host_bytes, "step_seconds": self.step, "hours": self.hours,
            "tokens_per_second": self.tokens / self.step, "mfu": self.mfu,
            "cost": price * self.hours * self.machines if price is not None else None,
        }  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """What a probe on this CPU found for one rank's micro-batch; see mmlm/train/probe.py."""

    forward_backward: float
    """Seconds of a micro-batch."""
    update: float
    """Seconds of the update of P/N parameters."""
    data: float
    """Seconds to make a micro-batch of samples that are read and decoded."""
    cached: float
    """The same, when they are in the loader's cache."""
    notes: list[str] = field(default_factory=list)


class Count(NamedTuple):
    """Parameters of a model, its adapters among them."""

    parameters: int
    trained: int
    """Those with a gradient."""
    tensors: int
    """How many tensors have one."""
    frozen: Frozen
    """The share of the weights of linear maps that has none."""


def count(config: AnyModelConfig, spec: FeatureSpec) -> int:
    """Parameters of the model, which is built without memory."""
    with torch.device("meta"):
        return sum(p.numel() for p in weights.build(config, spec).parameters())


def counted(config: LoopConfig, model: AnyModelConfig, spec: FeatureSpec) -> Count:
    """What a training of the model trains, and what it leaves alone."""
    with torch.device("meta"):
        net = learner(config, model, spec)
    trained = [p.numel() for p in net.parameters() if p.requires_grad]
    return Count(sum(p.numel() for p in net.parameters()), sum(trained), len(trained), frozen_share(net))


def learner(config: LoopConfig, model: AnyModelConfig, spec: FeatureSpec) -> Any:
    """The model of a training, with weights of no meaning: with its adapters, and what rests at rest."""
    net = weights.build(model, spec)
    if lora := getattr(config, "lora", None):
        adapters.add(net, lora)
        adapters.freeze_base(net, lora)
    let_rest(net, config)
    return net


def forecast(
    config: LoopConfig, model: AnyModelConfig, spec: FeatureSpec, work: Workload, device: Device, ranks: int,
    measured: Measured | None = None, teacher: AnyModelConfig | None = None,
) -> Forecast:  # fmt: skip
    """The forecast of one choice; the stage, offloading and precision are those of `config`. With a `teacher`, of
    distillation."""
    whole = counted(config, model, spec)
    mine = work.share(ranks * config.accumulate)
    memory, host = memory_of(config, model, spec, mine, device, ranks, whole)
    if teacher:
        memory |= teaching(config, teacher, spec, mine, device)
    on_node = min(ranks, device.per_node)
    saved = memory.get("checkpoint", 0.0)  # on a CPU
    saving = on_node if is_sharded(config, ranks, saved_bytes(config, whole.trained, 0)) else 1  # of these ranks
    if device.is_cpu:
        host = {"ranks": on_node * (sum(memory.values()) - saved) + saving * saved}
    seconds = seconds_of(config, model, spec, mine, device, ranks, whole, measured)
    if teacher and not measured:
        peak = device.peak / (1 if low_bytes(config) == 2 else 2) * device.efficiency / (ranks if device.is_cpu else 1)
        moved = computed_bytes(teacher, spec, mine.shape) * (ranks if device.is_cpu else 1) / device.bandwidth
        seconds["teacher"] = (forward_flops(teacher, spec, mine.shape) / peak + moved) * config.accumulate
    held = sum(memory.values()) - memory.get("mapped", 0.0)  # pages of files give way
    # a teacher comes first, in float32 as well, and is cast when it is there
    taught = 4.0 * count(teacher, spec) if teacher else 0.0
    come = max(taught, memory.get("teacher", 0.0) + 4.0 * whole.parameters)
    start = come + (BASE if device.is_cpu else CONTEXT)
    host_start = on_node * (start if device.is_cpu else max(taught, 4.0 * whole.parameters) + PROCESS)
    fullest = max(on_node * (held - saved) + saving * saved, host_start) if device.is_cpu else max(held, start)
    fits = fullest <= device.memory * 0.95
    return Forecast(
        device=device.name, ranks=ranks, stage=config.zero.stage, parameters=whole.parameters, memory=memory, host=host,
        seconds=seconds, tokens=work.tokens, flops=training_flops(model, spec, work.shape, frozen=whole.frozen),
        peak=device.peak, fits=fits, steps=config.steps, start=start, host_start=host_start,
    )  # fmt: skip


def moments(config: LoopConfig) -> int:
    """Bytes of optimizer state a parameter, beside its float32 master; of Muon what its matrices take."""
    return 4 if config.optimizer.kind in ("lion", "muon") else 8


def saved_bytes(config: LoopConfig, trained: float, resting: float) -> float:
    """Of a checkpoint: everything in float32, and of what rests the weights alone."""
    return (4 + moments(config) + (4 if config.ema else 0)) * trained + 4 * resting


def memory_of(
    config: LoopConfig, model: AnyModelConfig, spec: FeatureSpec, mine: Workload, device: Device, ranks: int,
    whole: Count,
) -> tuple[dict[str, float], dict[str, float]]:  # fmt: skip
    """(bytes of rank 0's device, bytes of the host for the ranks of its node), by part. The others hold no checkpoint, or
    their own pieces of one."""
    stage, b, on_node = config.zero.stage, low_bytes(config), min(ranks, device.per_node)
    P, trained = whole.parameters, whole.trained
    part = trained / ranks if stage >= 1 else trained
    plain = stage == 0 and config.precision == "fp32"  # as in train/engine.py: the optimizer works on the model's own
    state = moments(config) * part + (0 if plain else 4 * part)
    again = 0 if plain else 4 * part
    offloaded = config.zero.offload_optimizer
    offloaded_weights = config.zero.offload_parameters
    memory = {
        "weights": b * P if stage < 3 else (0 if offloaded_weights else b * P / ranks) + b * min(P, LIVE),
        "gradients": b * trained if stage < 2 else b * trained / ranks,
        "buffers": b * min(trained, BUCKET) * (0, 1, 1, 3)[stage],  # of what is sent; stage 3 fetches ahead as well
        "optimizer": 0.0 if offloaded else state + again,
        "average": 4 * part if config.ema else 0.0,
        "activations": activation_bytes(config, model, spec, mine.shape, on_cpu=device.is_cpu),
    }
    # who writes a checkpoint holds it while training goes on
    sharded = is_sharded(config, ranks, saved_bytes(config, trained, 0))
    saved = saved_bytes(config, trained / ranks if sharded else trained, P - trained)
    host = {"offloaded": (state + again if offloaded else 0.0) + (b * P / ranks if offloaded_weights else 0.0)}
    if device.is_cpu:
        memory["process"] = float(BASE)
        if mine.corpus:
            memory["cache"] = mine.corpus.cached(config.steps, ranks)
        memory["kept"] = min(1.5 * memory["activations"], HOLES) + max(SLACK, SLACK_SHARE * sum(memory.values()))
        if mine.corpus:
            memory["mapped"] = mine.corpus.touched(config.steps, ranks)
        memory["checkpoint"] = saved
        return memory, {}
    memory["runtime"] = CONTEXT
    copies = saved + (on_node - 1) * saved_bytes(config, trained / ranks, 0) * sharded
    return memory, {"offloaded": host["offloaded"] * on_node, "checkpoint": copies, "process": PROCESS * on_node}


def teaching(
    config: LoopConfig, teacher: AnyModelConfig, spec: FeatureSpec, mine: Workload, device: Device
) -> dict[str, float]:
    """Bytes of the teacher, of its forward pass at most (what one block would keep), and of the logits of both that exist at a
    time, in float32 beside their own precision."""
    b = low_bytes(config) if config.precision == "bf16" else 4  # a teacher has no fp16
    once = config.model_copy(update={"recompute": 1})
    logits = min(LOGITS // 4, mine.shape.targets * spec.vocab_size) * (4 * 4 + 2 * b)
    return {
        "teacher": float(b * count(teacher, spec)),
        "taught": activation_bytes(once, teacher, spec, mine.shape, on_cpu=device.is_cpu) + logits,
    }


def seconds_of(
    config: LoopConfig, model: AnyModelConfig, spec: FeatureSpec, mine: Workload, device: Device, ranks: int, whole: Count,
    measured: Measured | None,
) -> dict[str, float]:  # fmt: skip
    """Seconds of one step by part."""
    b, pieces = low_bytes(config), config.accumulate
    part = whole.trained / ranks if config.zero.stage >= 1 else whole.trained
    if measured:
        anew = mine.corpus.read_anew(config.steps, ranks) if mine.corpus else 1.0
        return {
            "forward_backward": measured.forward_backward * pieces,
            "update": measured.update,
            "data": (measured.cached + (measured.data - measured.cached) * anew) * pieces,
            "engine": ENGINE * whole.tensors * pieces,
            "between_ranks": between_ranks(config, device, ranks, whole),
        }
    peak = device.peak / (1 if b == 2 else 2) * device.efficiency
    bandwidth = device.bandwidth
    if device.is_cpu:  # the ranks share the machine
        peak, bandwidth = peak / ranks, bandwidth / ranks
    flops, again = (
        training_flops(model, spec, mine.shape, recomputed=yes, frozen=whole.frozen) for yes in (False, True)
    )
    ahead = forward_flops(model, spec, mine.views) if mine.views and pieces > 1 else 0  # train/terms/contrast.py
    more = (again - flops) / config.recompute if config.recompute else 0
    if config.recompute_granularity == "selective":
        more /= 2  # measured: docs/guide.md, "How it is trained"
    arithmetic = (flops + ahead + more) / peak
    # what is kept is written once and read once, and gradients of it are written and read as well
    moved = 4 * activation_bytes(config, model, spec, mine.shape, on_cpu=device.is_cpu) / bandwidth
    moved += computed_bytes(model, spec, mine.shape) / bandwidth
    if mine.views and pieces > 1:
        moved += computed_bytes(model, spec, mine.views) / bandwidth
    depth = len(model.channels) if model.kind == "cnn" else model.layers
    started = KERNELS * (depth + 5) * device.launch
    states = 4 * (4 + moments(config)) * part / 2
    update = (states + 2 * b * whole.trained) / bandwidth
    if config.zero.offload_optimizer and not device.is_cpu:
        update = states * min(ranks, device.per_node) / HOST_BANDWIDTH + 2 * b * whole.trained / bandwidth
    return {
        "forward_backward": max(arithmetic + moved, started) * pieces,
        "update": update,
        "data": 0.0,  # made beside the step
        "host_link": 0.0 if device.is_cpu else over_pcie(config, device, ranks, whole),
        "between_ranks": between_ranks(config, device, ranks, whole),
    }


def computed_bytes(model: AnyModelConfig, spec: FeatureSpec, shape: Shape) -> int:
    """Bytes that a stem moves for what it computes of pictures without a product of matrices, in the forward pass alone."""
    if not isinstance(model, ModelConfig) or model.image_stem != "hog" or not spec.image or spec.encoder("image"):
        return 0
    return -(-shape.patches // spec.image.tokens) * moved_bytes(spec.image)


def over_pcie(config: LoopConfig, device: Device, ranks: int, whole: Count) -> float:
    """Seconds that one rank's part of what is offloaded is on its way to the host's memory and back, over lanes of its own."""
    sent, pieces = 0.0, config.accumulate
    if config.zero.offload_optimizer:  # gradients go there, at stage 1 once a step, and updated weights come back
        sent += (pieces if config.zero.stage > 1 else 1) * whole.trained + whole.trained
    if config.zero.offload_parameters:  # they are fetched for the forward and for the backward pass
        sent += 2 * pieces * whole.parameters
    return low_bytes(config) * sent / ranks / (device.pcie * PCIE_REACHED)


def between_ranks(config: LoopConfig, device: Device, ranks: int, whole: Count) -> float:
    """Seconds that gradients and weights are on their way, by rings of N ranks (Rajbhandari et al. 2020, section 7)."""
    if ranks == 1:
        return 0.0
    link = device.link if ranks <= device.per_node else min(device.link, NODE_LINK)
    pieces, trained = config.accumulate, whole.trained
    # 0 and 1 reduce once a step, 2 with every micro-batch, 3 gathers all weights twice for each as well
    sent = {
        0: 2 * trained, 1: 2 * trained, 2: (1 + pieces) * trained, 3: pieces * (trained + 2 * whole.parameters),
    }[config.zero.stage]  # fmt: skip
    return low_bytes(config) * sent * (ranks - 1) / ranks / link + (MEETING if device.is_cpu else 0.0)
