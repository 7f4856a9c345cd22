"""Trunks against the models of transformers with the same weights, both ways."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmlm.data.collate import field_rows
from mmlm.errors import ConfigError
from mmlm.model.config import LinearScaling, Llama3Scaling, ModelConfig, YarnScaling
from mmlm.model.huggingface.settings import SHAPES, from_settings, to_settings
from mmlm.model.huggingface.tensors import from_llama, to_llama
from mmlm.model.transformer import FusedTransformer
from tests.model.texts import logits_of, texts
from tests.small import SPEC

transformers = pytest.importorskip("transformers")

SHAPED: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("LlamaForCausalLM", {}),
    "grouped, tied": ("LlamaForCausalLM", {"kv_heads": 2, "tied": True, "norm_epsilon": 1e-5}),
    "wide heads, biases": ("LlamaForCausalLM", {"head_size": 16, "attention_bias": "all", "rope_theta": 500.0}),
    "biases of q, k, v": ("Qwen2ForCausalLM", {"attention_bias": "qkv", "kv_heads": 1}),
    "normalised": ("Qwen3ForCausalLM", {"qk_norm": True, "head_size": 12, "kv_heads": 2, "tied": True}),
    "linear": ("LlamaForCausalLM", {"rope_scaling": LinearScaling(factor=4)}),
    "llama3": ("LlamaForCausalLM", {"rope_scaling": Llama3Scaling(factor=8, trained_length=32), "head_size": 32}),
    "yarn": ("Qwen3ForCausalLM", {"rope_scaling": YarnScaling(factor=4, trained_length=24), "qk_norm": True}),
    "yarn, by hand": (
        "LlamaForCausalLM",
        {"rope_scaling": YarnScaling(factor=3, trained_length=32, fast_turns=8, magnitude=1.2, whole_pairs=False)},
    ),
}


def trunk(seed: int = 0, **changes: Any) -> FusedTransformer:
    """A trunk in which biases and norms are random, too."""
    torch.manual_seed(seed)
    config = ModelConfig(**{"width": 32, "layers": 2, "heads": 4, "kv_heads": None, "qk_norm": False, **changes})
    net = FusedTransformer(config, SPEC, len(field_rows(SPEC))).eval()
    for name, parameter in net.named_parameters():
        if "bias" in name or "norm" in name:
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    return net


def as_hf(net: FusedTransformer) -> Any:
    settings = to_settings(net.config, SPEC.vocab_size, SPEC.max_len)
    config = transformers.AutoConfig.for_model(**settings)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    found = model.load_state_dict(to_llama(net.state_dict(), net.config), strict=False)
    assert not found.unexpected_keys and found.missing_keys in ([], ["lm_head.weight"])
    return model


@pytest.mark.parametrize("name", SHAPED)
def test_an_exported_trunk_gives_the_same_logits(name: str):
    wanted, changes = SHAPED[name]
    net = trunk(**changes)
    model = as_hf(net)
    assert type(model).__name__ == wanted
    with torch.no_grad():
        for ids in texts(SPEC.vocab_size, lengths=(3, 40, 90)):
            assert torch.allclose(model(ids[None]).logits[0], logits_of(net, ids), atol=1e-5)


@pytest.mark.parametrize("name", SHAPED)
def test_settings_and_tensors_come_back_as_they_went(name: str):
    net = trunk(**SHAPED[name][1])
    settings = as_hf(net).config.to_dict()  # with everything that transformers adds
    fields = from_settings(settings, "there", SPEC.max_len)
    config = ModelConfig(**fields)
    for key in SHAPES:
        own = {"kv_heads": net.config.key_value_heads, "mlp_width": net.config.feed_forward}
        assert getattr(config, key) == own.get(key, getattr(net.config, key)), key
    back = from_llama(to_llama(net.state_dict(), net.config), config)
    kept = {k: v for k, v in net.state_dict().items() if k.split(".")[0] in ("tokens", "blocks", "norm", "answer")}
    assert back.keys() == kept.keys() - ({"answer.weight"} if config.tied else set())
    assert all(torch.equal(back[key], kept[key]) for key in back)


def test_settings_of_older_files_are_read():
    old = {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
        "num_attention_heads": 4, "rms_norm_eps": 1e-5, "rope_theta": 5e5, "max_position_embeddings": 128,
        "rope_scaling": {
            "type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    }  # fmt: skip
    fields = from_settings(old, "there", 96)
    assert fields["rope_theta"] == 5e5 and fields["rope_scaling"] == Llama3Scaling(factor=8, trained_length=64)
    assert fields["kv_heads"] == 4 and fields["head_size"] is None and not fields["tied"]


MISTRAL = {
    "model_type": "mistral", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
    "num_attention_heads": 16, "max_position_embeddings": 32768,
}  # fmt: skip


def test_null_is_what_transformers_takes_it_for_and_not_the_default():
    """Mistral 7B v0.2 and on have `"sliding_window": null`: every position is attended to."""
    with pytest.raises(ConfigError, match="attends to the last 4096 positions only"):
        from_settings(MISTRAL, "there", 8192)
    assert transformers.MistralConfig(**{**MISTRAL, "sliding_window": None}).sliding_window is None
    fields = from_settings({**MISTRAL, "sliding_window": None}, "there", 8192)
    assert fields["kv_heads"] == transformers.MistralConfig(**MISTRAL).num_key_value_heads == 8
    for kind, config in (("qwen2", transformers.Qwen2Config), ("qwen3", transformers.Qwen3Config)):
        given = {**MISTRAL, "model_type": kind, "num_key_value_heads": None}
        assert from_settings(given, "there", 96)["kv_heads"] == config(**given).num_key_value_heads == 16
    # transformers 4 read null so of Mistral, too; 5 refuses it
    given = {**MISTRAL, "sliding_window": None, "num_key_value_heads": None}
    assert from_settings(given, "there", 96)["kv_heads"] == 16


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "gpt2"}, "of type 'gpt2'; wanted a causal language model: llama, mistral, qwen2, qwen3"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'; wanted 'silu'"),
        ({"mlp_bias": True}, "mlp_bias True"),
        ({"quantization_config": {"bits": 4}}, "is quantised"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rotary positions of type 'longrope'"),
        ({"partial_rotary_factor": 0.5}, "a part of each head"),
        ({"model_type": "mistral", "sliding_window": 32}, "the last 32 positions only; wanted at least 96"),
        ({"layer_types": ["linear_attention"]}, "layers of linear_attention"),
        ({"hidden_size": None}, "has no 'hidden_size'"),
        ({"num_attention_heads": None}, "has no 'num_attention_heads'"),
        ({"num_hidden_layers": "many"}, "cannot be used"),
    ],
)
def test_what_the_trunk_cannot_compute_is_refused(changes: dict[str, Any], said: str):
    with pytest.raises(ConfigError) as caught:
        from_settings({**to_settings(ModelConfig(qk_norm=False), 64, 96), **changes}, "/models/x", 96)
    assert said in str(caught.value) and "/models/x" in str(caught.value)


def test_what_llama_cannot_compute_is_refused():
    with pytest.raises(ConfigError, match=r"attend in both directions.*wanted causal.*--format hf"):
        to_settings(ModelConfig(attention="prefix"), 64, 96)
    with pytest.raises(ConfigError, match="qk_norm and attention_bias qkv"):
        to_settings(ModelConfig(qk_norm=True, attention_bias="qkv"), 64, 96)
