"""`config.json` of a causal language model of transformers 5 (Llama, Mistral, Qwen2, Qwen3) ↔ ModelConfig.

transformers' defaults count where a file leaves something out. What either side has no room for is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmlm.errors import ConfigError
from mmlm.model.config import LinearScaling, Llama3Scaling, ModelConfig, RopeScaling, YarnScaling

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""`model_type` → its class for causal language models."""
ABSENT = {
    "qwen3": {"num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128},
    "mistral": {"num_attention_heads": 32, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_attention_heads": 32, "num_key_value_heads": 32},
    "llama": {"num_attention_heads": 32},
}
"""What transformers takes for the settings of shape that a file leaves out."""
PLAIN = {"layout": "decoder", "mlp": "swiglu", "norm": "rms", "norm_at": "before", "positions": "rotary"}
"""What all of them have in common."""
SHAPES = ("width", "layers", "heads", "kv_heads", "head_size", "attention_bias", "qk_norm", "mlp_width", "rope_theta",
          "rope_scaling", "norm_epsilon", "tied", "layout", "mlp", "norm", "norm_at", "positions")  # fmt: skip
"""Fields of ModelConfig that a pretrained trunk decides."""
FREE = ("kind", "preset", "attention", "dropout", "pretrained", "image_stem", "image_places", "audio_stem",
        "image_encoder", "audio_encoder", "embedding")  # fmt: skip
"""Fields that say how it is trained, or what lies around the trunk; `attention` is looked at by itself."""


def to_settings(config: ModelConfig, vocabulary: int, length: int) -> dict[str, Any]:
    """`config.json` of the trunk: Qwen3 where queries and keys are normalised, Qwen2 where only they and the values have
    biases, else Llama. `length` is the longest record, tokens.

    Raises ConfigError naming what these models cannot compute.
    """
    _require_plain(config)
    kind = "qwen3" if config.qk_norm else "qwen2" if config.attention_bias == "qkv" else "llama"
    if kind == "qwen3" and config.attention_bias == "qkv":
        raise ConfigError(
            "the model has qk_norm and attention_bias qkv", wanted="attention_bias none or all with qk_norm: Qwen3 has no other",
            cure="export it with --format hf",
        )  # fmt: skip
    if kind == "qwen2" and config.head_width * config.heads != config.width:
        raise ConfigError(
            f"the model has attention_bias qkv and heads of {config.head_width} values",
            wanted=f"width / heads = {config.width / config.heads:g}, as Qwen2 has", cure="export it with --format hf",
        )  # fmt: skip
    settings: dict[str, Any] = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": vocabulary,
        "hidden_size": config.width,
        "intermediate_size": config.feed_forward,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.key_value_heads,
        "head_dim": config.head_width,
        "hidden_act": "silu",
        "max_position_embeddings": length,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tied,
        "rope_parameters": _rope_out(config.rope_theta, config.rope_scaling),
        "attention_dropout": 0.0,
        "use_cache": True,
        "dtype": "float32",
    }
    if kind != "qwen2":
        settings["attention_bias"] = config.attention_bias == "all"
    if kind == "llama":
        settings["mlp_bias"] = False
    else:
        settings |= {"use_sliding_window": False, "layer_types": ["full_attention"] * config.layers}
    return settings


def from_settings(settings: Mapping[str, Any], where: str, length: int) -> dict[str, Any]:
    """The fields of ModelConfig that `config.json` decides. `where` names its folder for messages; `length` is the longest
    record of the shards, tokens.

    Raises ConfigError naming what our trunk cannot compute, or what is missing.
    """
    kind = settings.get("model_type")
    if kind not in ARCHITECTURES:
        raise ConfigError(
            f"{where} holds a model of type {kind!r}", wanted=f"a causal language model: {', '.join(ARCHITECTURES)}",
            cure="use a checkpoint of one of them",
        )  # fmt: skip
    if "quantization_config" in settings:
        raise ConfigError(
            f"{where} is quantised", wanted="plain weights (float32, bfloat16, float16)",
            cure="take the checkpoint that it was made from",
        )  # fmt: skip
    # null is not absent: it means no window, or as many heads of keys as of queries
    found = {k: v for k, v in {**ABSENT[kind], **settings}.items() if v is not None}
    _require_known(found, kind, where, length)
    try:
        heads, width = int(found["num_attention_heads"]), int(found["hidden_size"])
        head = int(found.get("head_dim") or 0) if kind != "qwen2" else 0
        theta, scaling = _rope_in(found, where)
        return {
            "width": width,
            "layers": int(found["num_hidden_layers"]),
            "heads": heads,
            "kv_heads": int(found.get("num_key_value_heads") or heads),
            "head_size": head if head and head * heads != width else None,
            "attention_bias": "qkv" if kind == "qwen2" else "all" if found.get("attention_bias") else "none",
            "qk_norm": kind == "qwen3",
            "mlp_width": int(found["intermediate_size"]),
            "rope_theta": theta,
            "rope_scaling": scaling,
            "norm_epsilon": float(found.get("rms_norm_eps", 1e-6)),
            **PLAIN,
            "tied": bool(found.get("tie_word_embeddings", False)),
        }
    except KeyError as error:
        raise ConfigError(f"config.json of {where} has no {error}", wanted="a config.json of transformers") from None
    except (TypeError, ValueError) as error:
        raise ConfigError(f"config.json of {where} cannot be used ({error})") from None


def _require_plain(config: ModelConfig) -> None:
    """Raise ConfigError when a field that is neither a shape nor free differs from its default."""
    if config.attention != "causal":
        raise ConfigError(
            f"the model's prompts attend in both directions (attention {config.attention})",
            wanted="causal attention, the only one that LlamaForCausalLM computes", cure="export it with --format hf",
        )  # fmt: skip
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if name in PLAIN and value != PLAIN[name]:
            raise ConfigError(
                f"the model has {name} {value}", wanted=f"{PLAIN[name]}, as Llama and Qwen3 have",
                cure="export it with --format hf",
            )  # fmt: skip
        if name not in SHAPES and name not in FREE and value != field.get_default(call_default_factory=True):
            raise ConfigError(
                f"the model has {name} {value!r}", wanted=f"{field.default!r}: Llama and Qwen3 know nothing else",
                cure="export it with --format hf",
            )  # fmt: skip


def _require_known(found: Mapping[str, Any], kind: str, where: str, length: int) -> None:
    for name, wanted in (("hidden_act", "silu"), ("mlp_bias", False)):
        if found.get(name, wanted) != wanted:
            raise ConfigError(
                f"{where} has {name} {found[name]!r}", wanted=f"{wanted!r}: our trunk has SwiGLU without biases",
                cure="use another checkpoint",
            )  # fmt: skip
    window = found.get("sliding_window") if kind == "mistral" or found.get("use_sliding_window") else None
    layers = set(found.get("layer_types") or ["full_attention"])
    if layers - {"full_attention", "sliding_attention"}:
        raise ConfigError(
            f"{where} has layers of {', '.join(sorted(layers))}", wanted="full_attention", cure="use another checkpoint"
        )
    if window is not None and int(window) < length:
        raise ConfigError(
            f"{where} attends to the last {window} positions only", wanted=f"at least {length}, features.max_len",
            cure="lower features.max_len, or use another checkpoint",
        )  # fmt: skip


def _rope_out(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_theta": theta, "rope_type": scaling.kind if scaling else "default"}
    if scaling:
        rope["factor"] = scaling.factor
    if isinstance(scaling, Llama3Scaling):
        rope |= {"low_freq_factor": scaling.low_turns, "high_freq_factor": scaling.high_turns}
    if isinstance(scaling, YarnScaling):
        rope |= {"beta_fast": scaling.fast_turns, "beta_slow": scaling.slow_turns, "truncate": scaling.whole_pairs}
        if scaling.magnitude is not None:
            rope["attention_factor"] = scaling.magnitude
    if isinstance(scaling, Llama3Scaling | YarnScaling):
        rope["original_max_position_embeddings"] = scaling.trained_length
    return rope


def _rope_in(found: Mapping[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    """From `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    rope = {**(found.get("rope_scaling") or {}), **(found.get("rope_parameters") or {})}
    theta = float(rope.get("rope_theta", found.get("rope_theta", 10000.0)))
    if rope.get("partial_rotary_factor", found.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ConfigError(
            f"{where} turns only a part of each head (partial_rotary_factor)",
            wanted="1.0",
            cure="use another checkpoint",
        )
    kind = rope.get("rope_type", rope.get("type", "default"))
    trained: Any = rope.get("original_max_position_embeddings", found.get("max_position_embeddings"))
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, LinearScaling(factor=rope["factor"])
    if kind == "llama3":
        return theta, Llama3Scaling(
            factor=rope["factor"], low_turns=rope["low_freq_factor"], high_turns=rope["high_freq_factor"],
            trained_length=int(trained),
        )  # fmt: skip
    if kind == "yarn" and not rope.get("mscale_all_dim"):
        return theta, YarnScaling(
            factor=rope["factor"], trained_length=int(trained), fast_turns=rope.get("beta_fast") or 32.0,
            slow_turns=rope.get("beta_slow") or 1.0, magnitude=rope.get("attention_factor"),
            whole_pairs=rope.get("truncate", True),
        )  # fmt: skip
    raise ConfigError(
        f"{where} has rotary positions of type {kind!r}" + (" with mscale_all_dim" if kind == "yarn" else ""),
        wanted="default, linear, llama3, or yarn", cure="use another checkpoint",
    )  # fmt: skip
