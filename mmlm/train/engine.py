"""Engine: DeepSpeed behind the five things that the loop needs. The only module that imports deepspeed.

On a CPU two of its just-in-time builds are avoided (30 and 41 s): the shared-memory collectives and the fused Adam.
"""

from __future__ import annotations

import contextlib
import logging
import os
from typing import Any

import torch
import torch.distributed as dist

from mmlm.train.config import LoopConfig
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
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed  # after the environment says which accelerator

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if device.type == "cpu":
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=world.rank, world_size=world.size)
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    return device


def deepspeed_config(config: LoopConfig, world: World) -> dict[str, Any]:
    """DeepSpeed's own config, a pure function of ours and the number of ranks."""
    adam = {
        "lr": config.optimizer.lr,
        "betas": [config.optimizer.beta1, config.optimizer.beta2],
        "eps": 1e-8,
        "weight_decay": config.optimizer.weight_decay,
        "torch_adam": True,
        "adam_w_mode": True,
    }
    return {
        "train_micro_batch_size_per_gpu": max(1, config.data.batch // (world.size * config.accumulate)),
        "gradient_accumulation_steps": config.accumulate,
        "optimizer": {"type": "AdamW", "params": adam},
        "zero_optimization": {
            "stage": config.zero.stage,
            "overlap_comm": False,
            "contiguous_gradients": True,
            "reduce_bucket_size": 50_000_000,
            "allgather_bucket_size": 50_000_000,
            "stage3_param_persistence_threshold": 0,
        },
        "bf16": {"enabled": config.precision == "bf16"},
        "gradient_clipping": config.optimizer.clip,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices of linear maps decay; embeddings, norms and biases do not."""
    decayed = {m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)}
    groups = [
        {"params": [p for p in model.parameters() if p in decayed], "weight_decay": weight_decay},
        {"params": [p for p in model.parameters() if p not in decayed], "weight_decay": 0.0},
    ]
    return [g for g in groups if g["params"]]


class DeepSpeedEngine:
    """A model under ZeRO with its AdamW. `model` is what objectives call."""

    def __init__(self, model: torch.nn.Module, config: LoopConfig, world: World) -> None:
        import deepspeed

        self.world = world
        self.names = {p: n for n, p in model.named_parameters()}
        with _quiet():
            self.model, self.optimizer, _, _ = deepspeed.initialize(
                model=model,
                model_parameters=parameter_groups(model, config.optimizer.weight_decay),
                config=deepspeed_config(config, world),
            )
        self.module: torch.nn.Module = self.model.module
        self._create_adam_state()

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of one micro-batch's part of the loss; `config.accumulate` calls make a step.

        DeepSpeed averages gradients over ranks, so the part, already divided by global counts, is multiplied by their
        number here; its division by the number of micro-batches is turned off for the same reason.
        """
        self.model.backward(loss * self.world.size, scale_wrt_gas=False)
        if not self.model.is_gradient_accumulation_boundary():
            self.model.step()  # only counts the micro-batch

    def update(self, lr: float) -> float:
        """One optimizer step at rate `lr` with what was added. Returns the gradient norm before clipping."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.model.step()
        norm = self.model.get_global_grad_norm()
        return float(norm) if norm is not None else 0.0

    def state(self) -> dict[str, dict[str, torch.Tensor]]:
        """Full float32 tensors by kind (weight, exp_avg, exp_avg_sq) and parameter name. Every rank must call it."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        state: dict[str, dict[str, torch.Tensor]] = {"weight": {}, "exp_avg": {}, "exp_avg_sq": {}}
        for name, parameter in self.module.named_parameters():
            state["weight"][name] = safe_get_full_fp32_param(parameter).detach().float().cpu().clone()
            for kind in ("exp_avg", "exp_avg_sq"):
                state[kind][name] = safe_get_full_optimizer_state(parameter, kind).detach().float().cpu().clone()
        return state

    def load(self, state: dict[str, dict[str, torch.Tensor]], step: int) -> None:
        """Set what `state` gave, saved after `step` steps, on any number of ranks and at any ZeRO stage."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        for name, parameter in self.module.named_parameters():
            safe_set_full_fp32_param(parameter, state["weight"][name])
            for kind in ("exp_avg", "exp_avg_sq"):
                safe_set_full_optimizer_state(parameter, state[kind][name], kind)
        self._set_adam_step(step)
        self._refresh()

    def _create_adam_state(self) -> None:
        """Give AdamW its state before the first step, and let DeepSpeed link it to the parameters.

        Left alone it links after the step of the first parameter group, when the others have no state yet, so that
        reading or setting theirs fails (0.19.8, ZeRO 1 and 2); and a resumed run must set state before any step.
        """
        for flat in self._flat_parameters():
            state = self.optimizer.optimizer.state[flat]
            if not state:
                state["step"] = torch.zeros(())
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(flat), torch.zeros_like(flat)
        if hasattr(self.optimizer, "_hp_optimizer_states_linked"):
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()
        self._set_adam_step(0)

    def _flat_parameters(self) -> list[torch.Tensor]:
        """The float32 partitions that this rank's AdamW works on."""
        for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
            if hasattr(self.optimizer, name):
                return list(getattr(self.optimizer, name))
        raise TypeError(f"unknown ZeRO optimizer {type(self.optimizer).__name__}")

    def _set_adam_step(self, step: int) -> None:
        for flat in self._flat_parameters():
            self.optimizer.optimizer.state[flat]["step"] = torch.tensor(float(step))

    def _refresh(self) -> None:
        """Let the low-precision weights that the forward pass reads follow the float32 ones that were just set."""
        if hasattr(self.optimizer, "fp32_partitioned_groups_flat"):  # ZeRO-3
            flat = zip(
                self.optimizer.fp16_partitioned_groups_flat, self.optimizer.fp32_partitioned_groups_flat, strict=True
            )
            for number, (low, full) in enumerate(flat):
                low.data.copy_(full.data)
                self.optimizer._unflatten_partitioned_parameters(number)
        else:
            self.optimizer.update_lp_params()


@contextlib.contextmanager
def _quiet() -> Any:
    """DeepSpeed announces itself on stdout, once per rank."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


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


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
