"""The `generation` of a question: how its answer is to be worded, as GenerationConfig says."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import yaml

from mmlm.config import apply_override, parse, split_override
from mmlm.errors import ConfigError
from mmlm.features.spec import FeatureSpec
from mmlm.model.generation_config import GREEDY, GenerationConfig


def read_generation(value: Any, spec: FeatureSpec) -> GenerationConfig:
    """Raises ConfigError with all that is wrong in it."""
    if value is None:
        return GREEDY
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"`generation` is a {type(value).__name__}", wanted='an object, such as {"temperature": 0.7, "top_p": 0.9}'
        )
    config = parse(GenerationConfig, dict(value), "generation")
    most = longest_answer(spec)
    if config.max_tokens and config.max_tokens > most:
        raise ConfigError(
            f"generation.max_tokens = {config.max_tokens}", wanted=f"at most {most}, this model's longest"
        )
    return config


def longest_answer(spec: FeatureSpec) -> int:
    """Tokens: what the longest sequence of the shards leaves room for, and enough for a sentence in any case."""
    return max(48, spec.max_len)


def from_overrides(overrides: list[str]) -> dict[str, Any] | None:
    """`generation.top_p=0.9` and the like → the `generation` of a question; None without any."""
    told: dict[str, Any] = {}
    for text in overrides:
        key, raw = split_override(text)
        if not key.startswith("generation."):
            raise ConfigError(f"--set {key}", wanted="generation.KEY=VALUE, such as generation.temperature=0.7")
        apply_override(told, key, raw)
        if key in ("generation.choices", "generation.stop"):  # [yes, no, 1] are words here, not truths and numbers
            with contextlib.suppress(yaml.YAMLError):
                told["generation"][key.partition(".")[2]] = yaml.load(raw, yaml.BaseLoader)
    return told.get("generation")
