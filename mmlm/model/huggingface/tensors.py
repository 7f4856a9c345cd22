"""Names and layout of a trunk's tensors: ours, where maps of one input are one matrix ↔ those of transformers' Llama.

Both turn the same pairs of values (i, i + H/2) of a head by the rotary angle, so no row moves inside a head.

Ids: a tokenizer that was given keeps its ids in transformers; in the model they come after our marks. So its rows are
here `marks` later, and there the marks come last.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from mmlm.model.config import ModelConfig

Tensors = dict[str, torch.Tensor]

_PLAIN = {
    "attention_norm": "input_layernorm",
    "attention.out": "self_attn.o_proj",
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
    "feed_forward_norm": "post_attention_layernorm",
    "feed_forward.out": "mlp.down_proj",
}
"""Module of a block here → there."""
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")


def to_llama(ours: Mapping[str, torch.Tensor], config: ModelConfig, marks: int = 0) -> Tensors:
    """The trunk's tensors by transformers' names. `marks` is the number of our first rows of the vocabulary that come last
    there. Media embeddings and the class head have no place and are left out."""
    made: Tensors = {"model.norm.weight": ours["norm.weight"]}
    made["model.embed_tokens.weight"] = _marks_last(ours["tokens.weight"], marks)
    if not config.tied:
        made["lm_head.weight"] = _marks_last(ours["answer.weight"], marks)
    for n in range(config.layers):
        for name, tensor in ours.items():
            if not name.startswith(f"blocks.{n}."):
                continue
            module, _, kind = name.removeprefix(f"blocks.{n}.").rpartition(".")
            targets = split_module(module, config)
            for (target, _), part in zip(targets, tensor.split([r or len(tensor) for _, r in targets]), strict=True):
                made[f"model.layers.{n}.{target}.{kind}"] = part.contiguous()
    return made


def from_llama(theirs: Mapping[str, torch.Tensor], config: ModelConfig) -> Tensors:
    """The tensors of a trunk by our names, float32, the vocabulary in their order. Raises KeyError with the name of a
    tensor that is missing."""
    made: Tensors = {
        "norm.weight": theirs["model.norm.weight"].float(),
        "tokens.weight": theirs["model.embed_tokens.weight"].float(),
    }
    if not config.tied:
        made["answer.weight"] = theirs["lm_head.weight"].float()
    modules = ["attention_norm", "attention.qkv", "attention.out", "feed_forward_norm", "feed_forward.gate_up",
               "feed_forward.out"]  # fmt: skip
    modules += ["attention.query_norm", "attention.key_norm"] if config.qk_norm else []
    biased = {"none": (), "qkv": ("attention.qkv",), "all": ("attention.qkv", "attention.out")}[config.attention_bias]
    for n in range(config.layers):
        for module in modules:
            for kind in ("weight", "bias") if module in biased else ("weight",):
                parts = [theirs[f"model.layers.{n}.{target}.{kind}"] for target, _ in split_module(module, config)]
                made[f"blocks.{n}.{module}.{kind}"] = torch.cat(parts).float()
    return made


def split_module(module: str, config: ModelConfig) -> list[tuple[str, int]]:
    """Modules of a block of transformers that one of ours holds, with their numbers of rows (0: all), in order."""
    if module == "attention.qkv":
        H = config.head_width
        rows = (config.heads * H, config.key_value_heads * H, config.key_value_heads * H)
        return list(zip(_QKV, rows, strict=True))
    if module == "feed_forward.gate_up":
        return [(name, config.feed_forward) for name in _GATE_UP]
    return [(_PLAIN[module], 0)]


def _marks_last(weight_VD: torch.Tensor, marks: int) -> torch.Tensor:
    return torch.cat([weight_VD[marks:], weight_VD[:marks]]) if marks else weight_VD
