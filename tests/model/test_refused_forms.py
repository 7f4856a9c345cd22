"""Forms of a model that do not go together are refused where the config is read, and so is what a model cannot be asked."""

from __future__ import annotations

from typing import Any

import pytest

from mmlm.compress.config import DistillConfig
from mmlm.config import parse
from mmlm.errors import ConfigError
from mmlm.train.config import TrainConfig


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"fusion": "late", "tied": True}, "tied needs heads as wide"),
        ({"fusion": "late", "pretrained": {"folder": "/models/qwen"}}, "a trunk for each modality"),
        ({"layout": "encoder", "fusion": "add", "encoder_layers": 2}, "a setting of layout encoder_decoder"),
    ],
)
def test_forms_that_do_not_go_together(model: dict[str, Any], said: str):
    with pytest.raises(ConfigError, match=said):
        parse(TrainConfig, {"model": model}, "train")


@pytest.mark.parametrize("given", [{"loss": {"contrastive": {}}}, {"model": {"embedding": 8}}])
def test_vectors_are_not_distilled(given: dict[str, Any]):
    with pytest.raises(ConfigError, match="vectors are not distilled"):
        parse(DistillConfig, given, "distill")
