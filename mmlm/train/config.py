"""Settings of training. One loop serves training and distillation; what changes is the objective."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from mmlm.config import Config
from mmlm.data.config import DataConfig
from mmlm.model.baseline_config import AnyModelConfig
from mmlm.model.config import LoraConfig, ModelConfig

View = Literal["image", "audio", "fields", "context"]


def _tag(default: str) -> Discriminator:
    """Tells the choices of a union apart by their `kind`; without one it is `default`."""

    def kind(value: Any) -> Any:
        return value.get("kind", default) if isinstance(value, dict) else getattr(value, "kind", None)

    return Discriminator(kind)


class _Optimizer(Config):
    lr: float = Field(3e-3, gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(0.1, ge=0)
    """Decoupled; of the matrices of linear maps only, never of norms, biases and embeddings."""
    clip: float = Field(1.0, ge=0)
    """Largest gradient norm; 0 turns clipping off."""


class AdamWConfig(_Optimizer):
    """AdamW (Loshchilov & Hutter 2019)."""

    kind: Literal["adamw"] = "adamw"
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)


class LionConfig(_Optimizer):
    """Lion (Chen et al. 2023, algorithm 2): the sign of a momentum, and half the memory of AdamW."""

    kind: Literal["lion"] = "lion"
    lr: float = Field(3e-4, gt=0)
    """Peak learning rate; 3 to 10 times smaller than AdamW's."""
    weight_decay: float = Field(1.0, ge=0)
    """Decoupled, of matrices only; as many times larger as the rate is smaller."""
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.99, ge=0, lt=1)


class MuonConfig(_Optimizer):
    """Muon (Jordan et al. 2024) for hidden matrices, AdamW for all else. An update of Muon is scaled to the root mean
    square of one of AdamW's (Liu et al. 2025, eq. 4), so both share one rate and one weight decay."""

    kind: Literal["muon"] = "muon"
    modules: tuple[str, ...] = ("blocks",)
    """Modules (or patterns) below which the matrices of linear maps are Muon's."""
    momentum: float = Field(0.95, ge=0, lt=1)
    """Of Muon's average of gradients, applied in Nesterov's way."""
    iterations: int = Field(5, ge=1, le=10)
    """Newton-Schulz iterations."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Of AdamW."""
    beta2: float = Field(0.95, ge=0, lt=1)
    """Of AdamW."""


OptimizerConfig = Annotated[
    Annotated[AdamWConfig, Tag("adamw")] | Annotated[LionConfig, Tag("lion")] | Annotated[MuonConfig, Tag("muon")],
    _tag("adamw"),
]


class CosineConfig(Config):
    """Linear warm-up, then a cosine down to `floor`."""

    kind: Literal["cosine"] = "cosine"
    warmup: float = Field(0.05, ge=0, lt=1)
    """Share of the steps in which the rate rises."""
    floor: float = Field(0.02, ge=0, le=1)
    """Share of the peak rate at the last step."""


class WsdConfig(Config):
    """Warm-up, stable, decay (Hu et al. 2024): the peak rate is kept until the last steps, then it falls to `floor`."""

    kind: Literal["wsd"] = "wsd"
    warmup: float = Field(0.05, ge=0, lt=1)
    """Share of the steps in which the rate rises."""
    decay: float = Field(0.2, gt=0, le=1)
    """Share of the steps in which it falls, as 1 - sqrt (Hagele et al. 2024)."""
    floor: float = Field(0.0, ge=0, le=1)
    """Share of the peak rate at the last step."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.warmup + self.decay > 1:
            raise ValueError(f"warmup {self.warmup} and decay {self.decay} together must not exceed 1")
        return self


ScheduleConfig = Annotated[Annotated[CosineConfig, Tag("cosine")] | Annotated[WsdConfig, Tag("wsd")], _tag("cosine")]


class ZeroConfig(Config):
    stage: Literal[0, 1, 2, 3] = 2
    """What is spread over the ranks: 0 nothing, 1 optimizer states, 2 and gradients, 3 and parameters
    (Rajbhandari et al. 2020)."""
    offload_optimizer: bool = False
    """Optimizer states live in, and are updated in, the host's memory (Ren et al. 2021)."""
    offload_parameters: bool = False
    """Parameters that are not in use live in the host's memory; needs stage 3."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.offload_optimizer and self.stage == 0:
            raise ValueError("offload_optimizer needs stage 1, 2 or 3, found 0")
        if self.offload_parameters and self.stage != 3:
            raise ValueError(f"offload_parameters needs stage 3, found {self.stage}")
        return self


class ScalingConfig(Config):
    """Dynamic loss scaling of fp16 (Micikevicius et al. 2018): halved when a gradient overflows, and that step skipped."""

    initial_power: int = Field(16, ge=0, le=32)
    """The scale starts at 2 to this power."""
    window: int = Field(1000, ge=1)
    """Steps without overflow after which the scale is doubled."""
    minimum: float = Field(1.0, gt=0)
    """Training stops when a gradient still overflows at this scale."""


class FreezeConfig(Config):
    """Parameters that stay as they are in some steps: no gradient, no weight decay, no moment moves."""

    modules: tuple[str, ...]
    """Modules (`image`), or patterns of modules or parameters (`blocks.[01]`, `*norm.weight`)."""
    start: int = Field(0, ge=0)
    """First step, from 0, in which they are frozen."""
    end: int | None = Field(None, ge=1)
    """First step in which they are not any more; none: frozen to the last step."""

    @model_validator(mode="after")
    def _some_step(self) -> Self:
        if self.end is not None and self.end <= self.start:
            raise ValueError(f"end {self.end} must come after start {self.start}: no step would be frozen")
        return self


class EmaConfig(Config):
    """An exponential moving average of the weights, in float32 (Polyak & Juditsky 1992)."""

    decay: float = Field(0.999, gt=0, lt=1)
    """Share of the old average that each step keeps; (1 + step) / (10 + step) while that is smaller."""
    use: bool = True
    """The average, not the last weights, is validated and becomes the model."""


class ContrastiveConfig(Config):
    """InfoNCE (van den Oord et al. 2018): a record's modalities, each alone, find each other among those of all records of
    the step, on all ranks. Needs `model.embedding`."""

    weight: float = Field(1.0, ge=0)
    """Per pair of modalities of a record that has both."""
    between: list[tuple[View, View]] = Field(
        [("image", "audio"), ("image", "context"), ("audio", "context")], min_length=1
    )
    """Pairs of modalities."""
    temperature: float = Field(0.07, gt=0)
    """By which cosines are divided."""

    @model_validator(mode="after")
    def _pairs(self) -> Self:
        kinds = [frozenset(pair) for pair in self.between]
        if any(len(kind) < 2 for kind in kinds) or len(set(kinds)) < len(kinds):
            raise ValueError("between: each pair names two modalities, and each pair once")
        return self


class LossConfig(Config):
    """Weights of the terms that are added up."""

    answer: float = Field(1.0, ge=0)
    """Cross-entropy of the answer's tokens, per token."""
    label: float = Field(1.0, ge=0)
    """Cross-entropy of the class head, per labelled record."""
    labels: float = Field(1.0, ge=0)
    """Binary cross-entropies of the classes of which several may hold, summed over the classes, per record."""
    number: float = Field(1.0, ge=0)
    """Error of the number that is to be answered, in standard deviations, per record."""
    number_error: Literal["huber", "squared"] = "huber"
    """`squared`: half the square; `huber`: beyond one standard deviation only linear, so that wild targets do not lead."""
    contrastive: ContrastiveConfig | None = None
    """What brings the embeddings of a record's modalities together; none: they are not trained."""
    z: float = Field(0.0, ge=0)
    """Square of the logarithm of the softmax's denominator, per token of the answers (PaLM, Chowdhery et al. 2022, used
    1e-4): keeps logits from growing."""


class SpikesConfig(Config):
    """A step whose loss is not finite, or leaps, is skipped; many of them roll the training back."""

    deviations: float = Field(20.0, ge=0)
    """A loss this many standard deviations above the running mean is a leap; 0: only what is not finite is skipped."""
    rise: float = Field(2.0, ge=0)
    """And by at least this much (nats), so that noise near a loss of 0 is none. With few labelled records a step a single
    hard one made 12 deviations and 7 nats in the story `almanac`: that is no leap yet."""
    warmup: int = Field(20, ge=1)
    """Steps whose losses are seen before the first leap can be called so."""
    rollback_after: int = Field(5, ge=1)
    """Bad steps within `window` that roll the training back to the last checkpoint before them."""
    window: int = Field(50, ge=1)
    """Steps within which bad ones are counted."""
    give_up_after: int = Field(3, ge=0)
    """Roll-backs after which the training stops with an error."""


class ValidationConfig(Config):
    """The validation split, looked at while training with what its records give."""

    every: int = Field(0, ge=0)
    """Steps between two looks; 0: none."""
    records: int = Field(512, ge=1)
    """Of the split, the same at every look."""
    metric: Literal["loss", "label_accuracy"] = "loss"
    """By which the best checkpoint is chosen and training stops early."""
    patience: int = Field(0, ge=0)
    """Looks without a better value after which training ends; 0: it never ends early."""
    export: Literal["last", "best"] = "last"
    """Which weights become the model: those of the last step, or of the best look."""

    @model_validator(mode="after")
    def _something_to_choose_by(self) -> ValidationConfig:
        if not self.every and (self.patience or self.export == "best"):
            raise ValueError("patience and export=best need `every`: without a look there is nothing to choose by")
        return self


class LoopConfig(Config):
    """What every objective shares."""

    how_it_runs: ClassVar[tuple[str, ...]] = (
        "accumulate", "recompute", "recompute_granularity", "compile", "zero",
        "save_every", "keep", "keep_every", "keep_best", "checkpoint_format", "log_every",
    )  # fmt: skip
    """These may change while a training is stopped. A field that is not named here is part of what a model is, so a new one
    is, too. Precision is not one of them: it changes the numbers that are kept."""

    steps: int = Field(1500, ge=1)
    """Optimizer steps."""
    seed: int = Field(0, ge=0)
    """Of initialisation, order, dropout of modalities and augmentation."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Of weights, activations and gradients; the optimizer always works on float32 weights."""
    accumulate: int = Field(1, ge=1)
    """Micro-batches into which each rank's share of a step is cut; more take less memory, the loss stays the same."""
    recompute: int = Field(0, ge=0)
    """Activation checkpointing: every how manieth block keeps only its input and is run again in the backward pass; 1 is
    every block, 0 none. Less memory, up to half as much time again, the same numbers. A pretrained stem runs all its layers
    again."""
    recompute_granularity: Literal["full", "selective"] = "full"
    """`selective`: such a block also keeps what its linear layers gave, and only norms, rotations, activations and the scores of
    attention are computed again (Korthikanti et al. 2022): half the extra time, a quarter of the saving. Not with `compile`."""
    compile: bool = False
    """torch.compile for each block: pays on GPUs, not on CPUs; not at ZeRO stage 3."""
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = AdamWConfig()
    """How gradients become updates."""
    lr_factors: dict[str, Annotated[float, Field(ge=0)]] = {}
    """Module or pattern → factor of its learning rate; the first that fits counts."""
    freeze: list[FreezeConfig] = []
    schedule: ScheduleConfig = CosineConfig()
    """How the learning rate goes."""
    ema: EmaConfig | None = None
    """An average of the weights beside them; none: only the weights."""
    zero: ZeroConfig = ZeroConfig()
    scaling: ScalingConfig = ScalingConfig()
    loss: LossConfig = LossConfig()
    save_every: int = Field(250, ge=1)
    """Steps between checkpoints to resume from."""
    keep: int = Field(2, ge=1)
    """Newest checkpoints kept while training."""
    keep_every: int = Field(0, ge=0)
    """Checkpoints of steps that are multiples of this stay, too; 0: none."""
    keep_best: int = Field(0, ge=0)
    """And so many with the best value of `validation.metric`."""
    checkpoint_format: Literal["auto", "full", "sharded"] = "auto"
    """`full`: rank 0 gathers and writes whole tensors; `sharded`: each rank writes what ZeRO left it, at the same time, into a
    folder that all see. Either goes on with any number of ranks at any stage. `auto`: sharded from 1 GiB on."""
    spikes: SpikesConfig = SpikesConfig()
    validation: ValidationConfig = ValidationConfig()
    log_every: int = Field(10, ge=1)
    """Steps between rows of `metrics.jsonl`."""

    @model_validator(mode="after")
    def _compiles(self) -> Self:
        if self.compile and self.zero.stage == 3:
            raise ValueError("compile does not work at zero.stage 3, where a block's parameters come and go")
        if self.compile and self.recompute and self.recompute_granularity == "selective":
            raise ValueError("compile chooses itself what to keep: give recompute_granularity full, or compile false")
        return self

    @model_validator(mode="after")
    def _scored(self) -> Self:
        if self.keep_best and not self.validation.every:
            raise ValueError("keep_best needs validation.every: without a look there is nothing to choose by")
        return self


class TrainConfig(LoopConfig):
    model: AnyModelConfig = ModelConfig()
    """`kind: transformer`, or a small model for small data: `cnn`, `lstm`, `gru`."""
    lora: LoraConfig | None = None
    """Adapters on a pretrained trunk, which stays as it is; none: everything is trained."""

    @model_validator(mode="after")
    def _has_a_base(self) -> Self:
        if self.lora and getattr(self.model, "pretrained", None) is None:
            raise ValueError("lora needs model.pretrained: adapters on a trunk that knows nothing yet learn little")
        return self

    @model_validator(mode="after")
    def _embeds(self) -> Self:
        if self.loss.contrastive and not getattr(self.model, "embedding", None):
            raise ValueError("loss.contrastive needs model.embedding, the size of the vectors, such as 64")
        if (
            self.loss.contrastive
            and self.model.kind == "cnn"
            and any("context" in p for p in self.loss.contrastive.between)
        ):
            raise ValueError(
                "a cnn reads no text: loss.contrastive.between without `context`, such as [[image, audio]]"
            )
        return self
