"""Engine: DeepSpeed behind the five things that the loop needs. The only module that imports deepspeed.

On a CPU two of its just-in-time builds are avoided (30 and 41 s): the shared-memory collectives and the fused Adam.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist

from mmlm.errors import ConfigError, DataError
from mmlm.heap import ALL, keep_freed_memory
from mmlm.train import zero
from mmlm.train.config import LoopConfig
from mmlm.train.groups import frozen, let_rest, parameter_groups
from mmlm.train.memory import bound_kernels
from mmlm.train.optimizer import Optimizer
from mmlm.train.saved_tensors import Piece, run_of
from mmlm.train.shares import Share
from mmlm.world import World


def device_of(world: World) -> torch.device:
    """The GPU of this rank, or the CPU."""
    if torch.cuda.is_available():
        torch.cuda.set_device(world.local_rank % torch.cuda.device_count())
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def start(world: World) -> torch.device:
    """Join the process group (nccl on GPUs, gloo elsewhere) and return this rank's device."""
    device = device_of(world)
    for key, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(key, value)
    os.environ.setdefault("MASTER_PORT", "29511")
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        bound_kernels()
        keep_freed_memory(ALL)  # a Trimmer looks after it
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed = _deepspeed()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, rank=world.rank, world_size=world.size, store=_store_of_attempt(world))
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    # ZeRO 3 calls them a few times a step, and each call says so: a line in the rank's log every time
    old = "`torch.distributed.(reduce_scatter_tensor|all_gather_into_tensor)` is deprecated"
    warnings.filterwarnings("ignore", message=old, category=FutureWarning)
    return device


def _store_of_attempt(world: World) -> dist.Store | None:
    """Where the ranks of a torchrun that starts lost ones again (`--max-restarts`) find each other; None: where they would.

    Its store outlives them, and where the killed ranks listened still stands in it.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(*where, world.size, is_master=False, timeout=dist.default_pg_timeout)
    return dist.PrefixStore(f"mmlm/attempt-{attempt}", store)


def _deepspeed() -> Any:
    """Imported when the environment says which accelerator, and without MLflow, which its tuner would import and which
    takes a second of every rank."""
    hidden = not {"mlflow", "deepspeed"} & set(sys.modules)
    if hidden:
        sys.modules["mlflow"] = None  # type: ignore[assignment]
    try:
        import deepspeed
        import deepspeed.ops
    finally:
        if hidden:
            del sys.modules["mlflow"]
    return deepspeed


def deepspeed_config(config: LoopConfig, world: World) -> dict[str, Any]:
    """DeepSpeed's own config, a pure function of ours and the number of ranks. The optimizer is ours (optimizer.py)."""
    spread: dict[str, Any] = {"stage": config.zero.stage}
    if config.zero.stage:
        spread |= {
            "overlap_comm": False,
            "contiguous_gradients": True,
            "reduce_bucket_size": 50_000_000,
            "allgather_bucket_size": 50_000_000,
        }
    if config.zero.stage == 3:
        spread["stage3_param_persistence_threshold"] = 0
    if config.zero.offload_optimizer:
        spread["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if config.zero.offload_parameters:
        spread["offload_param"] = {"device": "cpu", "pin_memory": True}
    return {
        "train_micro_batch_size_per_gpu": max(1, config.data.batch // (world.size * config.accumulate)),
        "gradient_accumulation_steps": config.accumulate,
        "zero_optimization": spread,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": config.precision == "bf16", "check_grad_overflow": True},
        "fp16": {
            "enabled": config.precision == "fp16",
            "loss_scale": 0,  # dynamic
            "initial_scale_power": config.scaling.initial_power,
            "loss_scale_window": config.scaling.window,
            "min_loss_scale": config.scaling.minimum,
            "hysteresis": 1,
        },
        # stage 0 in float32 is clipped by us: DeepSpeed does not tell the norm there
        "gradient_clipping": 0.0 if _plain(config) else config.optimizer.clip,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def _check(config: LoopConfig) -> None:
    from deepspeed.accelerator import get_accelerator

    if config.precision == "fp16" and not get_accelerator().is_fp16_supported():
        raise ConfigError(
            "precision fp16 on a processor that does not compute in it",
            wanted="a GPU, or a CPU with AVX-512 FP16",
            cure="give precision bf16 or fp32",
        )


def _plain(config: LoopConfig) -> bool:
    """Whether DeepSpeed lets our optimizer work on the model's own parameters."""
    return config.zero.stage == 0 and config.precision == "fp32"


class DeepSpeedEngine:
    """A model under ZeRO with its optimizer. `model` is what objectives call.

    A step is `config.accumulate` calls of `backward`, then `update` or `discard`. `taken` counts steps, `updates` and
    `skipped` those that changed the weights or did not; `overflowed` says of the last one that fp16 was too narrow for
    its gradient and the loss scale was lowered, which is part of dynamic scaling and no fault.
    """

    def __init__(self, model: torch.nn.Module, config: LoopConfig, world: World) -> None:
        deepspeed = _deepspeed()
        _check(config)
        self.config, self.world = config, world
        self.taken = self.updates = self.skipped = 0
        self.overflowed = False
        names = {id(p): n for n, p in model.named_parameters()}
        resting = let_rest(model, config)
        self._resting_names = list(resting)
        self.resting = {name: p.detach().float().cpu().clone() for name, p in resting.items()} if world.is_main else {}
        """What is not trained, whole and in float32, on rank 0: it belongs to the model and to its checkpoints."""
        self.rules = Optimizer(parameter_groups(model, config), config)
        self._freeze()
        for group in self.rules.param_groups:
            if group["spans"]:
                for parameter in group["params"]:
                    parameter.register_hook(functools.partial(_frozen_gradient, group))
        with _quiet():
            self.model, self.optimizer, _, _ = deepspeed.initialize(
                model=model, optimizer=self.rules, config=deepspeed_config(config, world)
            )
        self.module: torch.nn.Module = self.model.module
        self.shares = zero.shares(self.optimizer, self.rules, names, world)
        for share in self.shares:
            self.rules.prepare(share)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of one micro-batch's part of the loss; `config.accumulate` calls make a step.

        DeepSpeed averages gradients over ranks, so the part, already divided by global counts, is multiplied by their
        number here; its division by the number of micro-batches is turned off for the same reason. At stage 0 its
        backward forgets the loss scale of fp16, by which its step divides all the same (0.19.8).
        """
        scale = zero.loss_scale(self.optimizer) if self.config.zero.stage == 0 else 1.0
        self.model.backward(loss * (self.world.size * scale), scale_wrt_gas=False)
        if not self.model.is_gradient_accumulation_boundary():
            self.model.step()  # only counts the micro-batch

    def update(self, lr: float) -> float:
        """One optimizer step at rate `lr` with what was added. Returns the gradient norm before clipping; when it is
        not a finite number, nothing was changed on any rank. Raises DataError when fp16 cannot be scaled any lower."""
        for group in self.rules.param_groups:
            group["lr"] = lr * group["factor"]
        return self._step(hold=False)

    def discard(self) -> None:
        """Forget what was added, and go on to the next step."""
        self._step(hold=True)

    def pass_over(self) -> None:
        """A step that is not even tried, by any rank: only the schedules go on."""
        self.taken, self.skipped = self.taken + 1, self.skipped + 1
        self._freeze()

    def _step(self, hold: bool) -> float:
        self.rules.hold, self.rules.updates = hold, self.updates
        scale = zero.loss_scale(self.optimizer)
        norm = self._clip() if _plain(self.config) else 0.0
        self.rules.hold |= not math.isfinite(norm)
        try:
            self.model.step()
        except Exception as error:
            if "loss scale already at minimum" not in str(error):
                raise
            raise DataError(
                f"gradients overflow fp16 even at the loss scale {scale:g}",
                cure="lower optimizer.lr or scaling.minimum, or give precision bf16 or fp32",
            ) from None
        if not _plain(self.config):
            norm = float(self.model.get_global_grad_norm() or 0.0)
            norm /= scale if self.config.zero.stage == 0 else 1.0  # there it is that of the scaled gradients
        done = math.isfinite(norm) and not hold
        self.overflowed = not math.isfinite(norm) and zero.loss_scale(self.optimizer) < scale
        self.taken, self.updates, self.skipped = self.taken + 1, self.updates + done, self.skipped + (not done)
        self._freeze()
        return norm

    def _clip(self) -> float:
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.config.optimizer.clip:
            torch.nn.utils.clip_grads_with_norm_(self.module.parameters(), self.config.optimizer.clip, norm)
        return float(norm)

    def _freeze(self) -> None:
        for group in self.rules.param_groups:
            group["frozen"] = frozen(group["spans"], self.taken)

    def state(self) -> dict[str, dict[str, torch.Tensor]]:
        """Whole float32 tensors by kind (weight, exp_avg, …) and parameter name, on the host of rank 0; empty on the
        others. Every rank must call it."""
        state: dict[str, dict[str, torch.Tensor]] = {}
        for share in self.shares:
            for kind in ("weight", *self.rules.kinds(share.group)):
                for number, whole in share.wholes(self._flat(share, kind)):
                    if self.world.is_main:
                        state.setdefault(kind, {})[share.runs[number].name] = whole.float().cpu().clone()
        for kind in {"weight", "ema"} & state.keys():
            state[kind] |= self.resting
        return state

    def pieces(self) -> dict[str, dict[str, Piece]]:
        """What `state` gives, as far as this rank holds it; rank 0 has what rests as well. No rank waits for another."""
        pieces: dict[str, dict[str, Piece]] = {}
        for share in self.shares:
            for kind in ("weight", *self.rules.kinds(share.group)):
                flat = self._flat(share, kind)
                for number, run in enumerate(share.runs):
                    if run.elements or not run.shape.numel():
                        held = share.run_of(flat, number).float().cpu().clone()
                        pieces.setdefault(kind, {})[run.name] = Piece(run.there, run.shape, held)
        for kind in ("weight", "ema") if self.config.ema else ("weight",):
            resting = {name: Piece(0, whole.shape, whole.view(-1)) for name, whole in self.resting.items()}
            pieces.setdefault(kind, {}).update(resting)
        return pieces

    @property
    def trained_bytes(self) -> int:
        """Of what `state` gives, without what rests. The same on every rank."""
        kinds = ((share, 1 + len(self.rules.kinds(share.group))) for share in self.shares)
        return 4 * sum(count * run.shape.numel() for share, count in kinds for run in share.runs)

    def scalars(self) -> dict[str, float]:
        """What else a checkpoint needs: counters and the loss scale. The same on every rank."""
        counts = {"taken": self.taken, "updates": self.updates, "skipped": self.skipped}
        for share in self.shares:
            counts[f"updates.{share.group['name']}"] = int(self.rules.state[share.tensor]["step"])
        return {**counts, **zero.scaler_state(self.optimizer)}

    def load(self, state: Mapping[str, Mapping[str, torch.Tensor]], scalars: Mapping[str, float]) -> None:
        """Set what `state` and `scalars` gave, on any number of ranks and at any ZeRO stage."""
        for share in self.shares:
            for kind in ("weight", *self.rules.kinds(share.group)):
                flat = self._flat(share, kind)
                for number, run in enumerate(share.runs):
                    if run.elements:
                        share.run_of(flat.data, number).copy_(run_of(state[kind], run.name, run.there, run.elements))
            self.rules.state[share.tensor]["step"].fill_(scalars[f"updates.{share.group['name']}"])
        self._set_resting({name: state["weight"][name] for name in self._resting_names})
        # a copy: else the file stays mapped, and its space taken, for as long as this training runs
        self.resting = {name: state["weight"][name].float().clone() for name in self.resting}
        self.taken, self.updates, self.skipped = (int(scalars[k]) for k in ("taken", "updates", "skipped"))
        zero.set_scaler_state(self.optimizer, scalars)
        self._freeze()
        zero.refresh(self.optimizer)

    def result(self) -> dict[str, torch.Tensor]:
        """The weights that become the model, as `state` gives them: the average when the config says so."""
        kind = "ema" if self.config.ema and self.config.ema.use else "weight"
        weights: dict[str, torch.Tensor] = {}
        for share in self.shares:
            for number, whole in share.wholes(self._flat(share, kind)):
                if self.world.is_main:
                    weights[share.runs[number].name] = whole.float().cpu().clone()
        return weights | self.resting

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """The model computes with what `result` gives, in evaluation mode."""
        swap = bool(self.config.ema and self.config.ema.use)
        kept = [share.tensor.detach().clone() for share in self.shares] if swap else []
        if swap:
            self._set([self.rules.state[share.tensor]["ema"] for share in self.shares])
        self.model.eval()
        try:
            yield
        finally:
            self.model.train()
            if swap:
                self._set(kept)

    def _set(self, weights: list[torch.Tensor]) -> None:
        for share, weight in zip(self.shares, weights, strict=True):
            share.tensor.data.copy_(weight)
        zero.refresh(self.optimizer)

    @torch.no_grad()
    def _set_resting(self, weights: dict[str, torch.Tensor]) -> None:
        named = dict(self.module.named_parameters())
        for name, weight in weights.items():
            with _whole(named[name]):
                named[name].copy_(weight)

    def _flat(self, share: Share, kind: str) -> torch.Tensor:
        return share.tensor.detach() if kind == "weight" else self.rules.state[share.tensor][kind]


def _frozen_gradient(group: dict[str, Any], gradient: torch.Tensor) -> torch.Tensor | None:
    return torch.zeros_like(gradient) if group["frozen"] else None


def _whole(parameter: torch.nn.Parameter) -> contextlib.AbstractContextManager[Any]:
    """In here a parameter that ZeRO 3 has cut is whole; what rank 0 makes of it stays."""
    if not hasattr(parameter, "ds_id"):
        return contextlib.nullcontext()
    gathered: contextlib.AbstractContextManager[Any] = _deepspeed().zero.GatheredParameters([parameter], 0)
    return gathered


@contextlib.contextmanager
def _quiet() -> Any:
    """DeepSpeed announces itself on stdout, once per rank."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def wait(device: torch.device) -> None:
    """Until what was begun on a GPU is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def total(values: list[float], device: torch.device) -> list[float]:
    """Each value summed over all ranks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return tensor.tolist()


def broadcast(value: Any) -> Any:
    """Rank 0's `value`, on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: Any) -> list[Any]:
    """Each rank's `value`, in their order, on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
