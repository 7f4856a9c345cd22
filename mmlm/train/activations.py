"""Bytes that autograd keeps of a micro-batch, counted tensor by tensor from the model's own code."""

from __future__ import annotations

from mmlm.features.spec import FeatureSpec
from mmlm.model.baseline_config import AnyModelConfig
from mmlm.model.baseline_flops import kept_values
from mmlm.model.config import ModelConfig
from mmlm.model.cross_entropy import LOGITS
from mmlm.model.flops import Shape, Stack, media_of, stacks_of
from mmlm.model.huggingface.stems import dimensions
from mmlm.model.kernels import rung_of
from mmlm.model.packed import KEPT
from mmlm.train.config import LoopConfig
from mmlm.train.groups import rests

HIDDEN = {"swiglu": 4, "relu": 1, "gelu": 2}
"""How many values a feed-forward keeps for each hidden one: both halves, SiLU and the product; the maximum; both sides."""


def low_bytes(config: LoopConfig) -> int:
    """Bytes of a number in the working precision."""
    return 4 if config.precision == "fp32" else 2


def activation_bytes(
    config: LoopConfig, model: AnyModelConfig, spec: FeatureSpec, shape: Shape, *, on_cpu: bool
) -> float:
    """Of one micro-batch, and what the heads need on top at the end."""
    b, D, every = low_bytes(config), model.width, config.recompute
    if not isinstance(model, ModelConfig):
        rows = 0 if model.kind == "cnn" else shape.targets
        ends = (spec.vocab_size * D * (4 + b)) if rows else 0
        return kept_values(model, spec, shape) * b + ends + min(LOGITS, rows * spec.vocab_size) * (b + 8)
    stacks = stacks_of(model, spec, shape)
    if on_cpu and b < 4:
        stacks = [_rounded(stack, D) for stack in stacks]
    kept, largest = 0.0, 0.0
    for stack in stacks:
        block, last = _block(model, stack, b, on_cpu)
        whole = [n for n in range(stack.layers) if not every or n % every]
        kept += sum(last if n == stack.layers - 1 else block for n in whole)
        kept += stack.gates * _gate(model, stack, b) if stack.gates else 0
        if every:  # the others keep their input, perhaps what their linear layers give, and one at a time is run again
            maps, last_maps = _maps(model, stack, b) if config.recompute_granularity == "selective" else (0.0, 0.0)
            again = [n for n in range(stack.layers) if not n % every]
            kept += len(again) * sum(stack.lengths) * D * b
            kept += sum(last_maps if n == stack.layers - 1 else maps for n in again)
            largest = max(largest, block - maps)
    # embeddings with filled slots (which a block that is run again keeps as its input), what the heads read, the
    # vocabulary head's own gradient, a piece of logits
    read, words = stacks[-1].read, 0 if model.layout == "encoder" else spec.vocab_size
    tokens = sum(sum(stack.lengths) for stack in stacks)
    ends = ((0 if every else tokens) + 4 * read) * D * b + words * D * (4 + b)
    ends += min(LOGITS, shape.targets * words) * (b + 8)
    return kept + largest + ends + _encoders(config, model, spec, shape, b, every)


def _encoders(loop: LoopConfig, model: ModelConfig, spec: FeatureSpec, shape: Shape, b: int, every: int) -> float:
    """Of pretrained encoders of pictures and sounds, whose attention keeps no probabilities."""
    total = 0.0
    for kind, config, items in zip(
        ("image", "audio"), (model.image_encoder, model.audio_encoder), media_of(spec, shape), strict=True
    ):
        if config and not rests(f"{kind}.project.encoder.layers.0.weight", loop):  # else nothing flows back through it
            layers, tokens, width, hidden = dimensions(config)
            block, inputs = items * tokens * (8 * width + 2 * hidden) * b, items * tokens * width * b
            total += layers * inputs + block if every else layers * block
    return total


def _rounded(stack: Stack, width: int) -> Stack:
    """With the positions of nobody, a record of their own, and those that are read for nothing (model/streams.py)."""
    tokens = sum(stack.lengths)
    more = rung_of(tokens, width) - tokens
    asked = None if stack.asked is None else [*stack.asked, 0]
    read = min(rung_of(stack.read, width), tokens + more)
    return stack._replace(lengths=[*stack.lengths, more], asked=asked, read=read)


def _block(model: ModelConfig, stack: Stack, b: int, on_cpu: bool) -> tuple[float, float]:
    """Of one block, and of the last, whose feed-forward works where a head reads."""
    fed = (2 * model.width + HIDDEN[model.mlp] * model.feed_forward) * b
    asks = stack.asked is not None and not stack.gates
    attention = _attention(model, stack, b, on_cpu) + (_across(model, stack, b) if asks else 0)
    return attention + sum(stack.lengths) * fed, attention + stack.read * fed


def _maps(model: ModelConfig, stack: Stack, b: int) -> tuple[float, float]:
    """What the linear layers of one block give, and of the last."""
    D, H, tokens = model.width, model.head_width, sum(stack.lengths)
    attention = tokens * ((model.heads + 2 * model.key_value_heads) * H + D)
    if stack.asked is not None and not stack.gates:
        attention += tokens * (model.heads * H + D) + sum(stack.asked) * 2 * model.key_value_heads * H
    fed = (2 if model.mlp == "swiglu" else 1) * model.feed_forward + D
    return (attention + tokens * fed) * b, (attention + stack.read * fed) * b


def _gate(model: ModelConfig, stack: Stack, b: int) -> float:
    """Of one gated layer: its attention, its feed-forward, and what the gates multiply."""
    fed = (2 * model.width + HIDDEN[model.mlp] * model.feed_forward + 2 * model.width) * b
    return _across(model, stack, b) + sum(stack.lengths) * fed


def _attention(model: ModelConfig, stack: Stack, b: int, on_cpu: bool) -> float:
    """Norm in and out, queries, keys, values, what the output map reads; the probabilities of short records on a CPU
    (model/packed.py), on a GPU the matrix of all three and the rotated queries and keys."""
    tokens, D = sum(stack.lengths), model.width
    if not on_cpu:
        return float(tokens * 8 * D * b + (tokens * 2 * D * b if model.qk_norm else 0))
    seen = sum(length**2 for length in stack.lengths if length <= KEPT)
    once = 4 + 2 * model.key_value_heads / model.heads + 2 * model.qk_norm
    return float(tokens * once * D * b + seen * model.heads * b)


def _across(model: ModelConfig, stack: Stack, b: int) -> float:
    """Norm in and out, queries, what the output map reads; keys and values, once for each head that reads them, and the
    probabilities."""
    asked = stack.asked or ()
    seen = sum(n * m for n, m in zip(stack.lengths, asked, strict=True))
    asking = sum(stack.lengths) * (6 + model.qk_norm)
    return float((asking + sum(asked) * (2 + model.qk_norm)) * model.width * b + seen * model.heads * b)
