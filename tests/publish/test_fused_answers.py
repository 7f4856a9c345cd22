"""People's questions to a checkpoint of every fusion: any input may be missing, and neighbours change nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mmlm.config import parse
from mmlm.features import spec as feature_spec
from mmlm.model.config import ModelConfig
from mmlm.publish.answering import Responder
from mmlm.train import weights
from tests.model.test_fusion import FUSIONS
from tests.publish.conftest import QUESTIONS, World


@pytest.mark.parametrize("layout", ["decoder", "encoder_decoder"])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_questions_with_any_inputs_are_answered_alone_as_together(
    fusion: str, layout: str, world: World, tmp_path: Path
):
    torch.manual_seed(1)
    sizes = {"width": 16, "layers": 2, "heads": 2, "attention": "prefix"}
    config = parse(ModelConfig, {**sizes, "fusion": fusion, "layout": layout}, "test")
    model = weights.build(config, feature_spec.load(world.shards.path))
    weights.save_model(tmp_path, model.state_dict(), config, world.shards.path)
    responder = Responder.load(tmp_path)
    image, audio = world.picture(200), world.sound(700)
    asked: list[dict[str, Any]] = [
        {"text": QUESTIONS[0], "image": image, "audio": audio},
        {"text": QUESTIONS[1], "image": image},
        {"audio": audio},
        {"text": QUESTIONS[0]},
    ]
    together = responder.answer(asked)
    for question, answer in zip(asked, together, strict=True):
        alone = responder.answer([question])[0]
        assert alone["answer"] == answer["answer"] and "error" not in answer
        assert alone["label_scores"] == pytest.approx(answer["label_scores"], abs=1e-4)
    scores = [tuple(answer["label_scores"].values()) for answer in together]
    assert len(set(scores)) == len(scores)  # what is given matters
