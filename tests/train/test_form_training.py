"""The classic forms train, stop, go on and answer as the default one does, on real ranks over gloo."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mmlm import artifacts
from mmlm.artifacts import Artifact
from mmlm.config import parse
from mmlm.data.reader import ShardReader
from mmlm.evals.answer import Answerer
from mmlm.launch.local import ranks
from mmlm.tracking import NullTracker
from mmlm.train.config import TrainConfig
from mmlm.train.train import train

CLASSIC = {"norm": "layer", "norm_at": "after", "mlp": "relu", "kv_heads": 2, "qk_norm": False}
FORMS: dict[str, dict[str, Any]] = {
    "Vaswani's": {**CLASSIC, "layout": "encoder_decoder", "positions": "sinusoidal"},
    "BERT's": {**CLASSIC, "layout": "encoder", "positions": "learned", "mlp": "gelu"},
    "muP": {"initialisation": {"kind": "mup", "base_width": 16}},
}


def settings(form: str, **changes: Any) -> TrainConfig:
    model = {"width": 32, "layers": 1, "heads": 2, "attention": "prefix", **FORMS[form]}
    data = {"batch": 16, "pack": {"kind": "best_fit"}, "modality_dropout": 0.5}
    plain = {"steps": 4, "save_every": 2, "keep": 3, "log_every": 1, "model": model, "data": data}
    return parse(TrainConfig, {**plain, **changes}, "test")


@pytest.mark.slow  # six trainings of four steps, 15 s each
@pytest.mark.parametrize("form", FORMS)
def test_a_form_trains_goes_on_after_a_stop_and_answers(form: str, keypad_shards: Artifact, tmp_path: Path):
    config = settings(form, zero={"stage": 3})
    whole = train(config, keypad_shards, out=tmp_path / "whole", launch=ranks(2), tracker=NullTracker())
    out = tmp_path / "model"
    shutil.copytree(whole.path, out)
    (out / "artifact.json").unlink()
    shutil.rmtree(out / "checkpoints" / "step-00000004")
    (out / artifacts.WORK).write_text(json.dumps({"fingerprint": whole.fingerprint}))
    resumed = train(config, keypad_shards, out=out, launch=ranks(2), tracker=NullTracker())
    assert resumed.digest == whole.digest
    answerer = Answerer(out)
    reader = ShardReader(keypad_shards.path)
    samples = [reader[n] for n in range(3)]
    one, many = answerer.answer(samples, batch_size=1), answerer.answer(samples)
    assert [a.answer for a in one] == [a.answer for a in many] and all(a.label_scores for a in one)
    assert [a.score for a in one] == pytest.approx([a.score for a in many], abs=1e-4)
