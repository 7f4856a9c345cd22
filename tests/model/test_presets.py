"""Sizes by name: what their table says is counted again, and they are chosen as people choose them."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from mmlm import plans
from mmlm.cli import main
from mmlm.config import DECIDED_BY_PRESET, apply_override, parse
from mmlm.errors import ConfigError
from mmlm.features.spec import FeatureSpec, TaskSpec
from mmlm.model.config import ModelConfig
from mmlm.model.flops import Shape, training_flops
from mmlm.model.presets import PRESETS
from mmlm.story import load
from mmlm.train import devices, weights

SPEC = FeatureSpec(
    vocab_size=32_768, tokenizer_digest="none", max_len=2048, tasks=[TaskSpec(name="t", labels=["a", "b"])]
)
SHAPES = {
    "decoder": Shape((2048,), 2048, prompts=(0,)),
    "encoder_decoder": Shape((2048,), 1024, prompts=(1024,)),
    "encoder": Shape((2048,), 0, 1, prompts=(2047,)),
}
"""One record of 2,048 positions, as mmlm/model/presets.py says."""


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_as_large_as_its_table_says(name: str):
    config = ModelConfig(preset=name)  # type: ignore[arg-type]
    with torch.device("meta"):
        net = weights.build(config, SPEC)
    assert sum(p.numel() for p in net.parameters()) == PRESETS[name].parameters
    assert training_flops(config, SPEC, SHAPES[config.layout]) // 2048 == PRESETS[name].flops


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in ("vaswani", "bert")])
def test_the_flops_of_a_decoder_are_those_of_its_linear_maps_and_scores(name: str):
    """Counted from the modules: every map on every position, thrice for both gradients, and the scores of all pairs."""
    config = ModelConfig(preset=name)  # type: ignore[arg-type]
    with torch.device("meta"):
        net = weights.build(config, SPEC)
    maps = sum(2 * m.weight.numel() for key, m in net.named_modules() if isinstance(m, nn.Linear) and key != "label")
    scores = config.layers * 4 * 2048 * config.heads * config.head_width
    assert 3 * (maps + scores) == PRESETS[name].flops


def test_sizes_rise_and_names_tell_them():
    sizes = [PRESETS[name].parameters for name in PRESETS if name not in ("vaswani", "bert")]
    assert sizes == sorted(sizes)
    for name, least, most in (("350m", 3.4e8, 3.6e8), ("760m", 7.4e8, 7.8e8), ("1b", 1e9, 1.1e9), ("7b", 7e9, 7.5e9)):
        assert least < PRESETS[name].parameters < most


def test_what_is_given_beside_a_preset_overrides_it():
    plain = ModelConfig(preset="small")
    assert (plain.width, plain.layers, plain.heads, plain.kv_heads, plain.feed_forward) == (512, 8, 8, 4, 1376)
    wider = ModelConfig(preset="small", width=1024)
    assert (wider.width, wider.layers, wider.feed_forward) == (1024, 8, 2736)  # of its own width
    assert ModelConfig(preset="small", heads=16).kv_heads == 8
    assert ModelConfig.model_validate(wider.model_dump(mode="json")) == wider
    assert ModelConfig() == ModelConfig(preset="tiny")
    assert (ModelConfig(width=24, heads=3).kv_heads, ModelConfig(heads=1).kv_heads) == (3, 1)


def test_a_preset_on_the_command_line_replaces_the_sizes_of_a_file():
    story = load("demo", ["train.model.preset=small", "train.model.layers=3"])
    model = story.train.model
    assert isinstance(model, ModelConfig)
    assert (model.width, model.heads, model.kv_heads, model.qk_norm) == (512, 8, 4, True)
    assert model.layers == 3 and model.attention == "prefix"  # what comes later, and what no preset says anything of
    data = {"model": {"width": 64, "dropout": 0.1}}
    apply_override(data, "model.preset", "base")
    assert data == {"model": {"preset": "base", "dropout": 0.1}}
    assert {key for preset in PRESETS.values() for key in preset.fields} | {"encoder_layers"} == DECIDED_BY_PRESET
    with pytest.raises(ConfigError, match="preset"):
        parse(ModelConfig, {"preset": "huge"}, "test")


def test_the_plan_shows_every_size(capsys: pytest.CaptureFixture[str], tmp_path: object):
    command = ["plan", "demo", "--out", str(tmp_path), "--gpu", "h100", "--presets"]
    assert main([*command, "--json"]) == 0
    rows = {row["preset"]: row for row in json.loads(capsys.readouterr().out)}
    assert {"tiny", "7b", "vaswani"} <= rows.keys()
    assert rows["7b"]["parameters"] > 6e9 and not rows["7b"]["fits"] and rows["tiny"]["fits"]
    told = plans.words_of_presets(plans.subject("demo", [], None), devices.DEVICES["h100"], list(rows.values()))
    assert "--set train.model.preset=NAME" in told and "7,0" in told
