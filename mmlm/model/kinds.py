"""The model that a config asks for, of whatever kind, with new weights."""

from __future__ import annotations

from mmlm.features.spec import FeatureSpec
from mmlm.model.baseline_config import AnyModelConfig, CnnConfig
from mmlm.model.config import ModelConfig
from mmlm.model.convolutional import CnnModel
from mmlm.model.layouts import build_model
from mmlm.model.recurrent import RecurrentModel
from mmlm.model.transformer import FusedTransformer


def build(config: AnyModelConfig, spec: FeatureSpec, field_rows: int = 0) -> FusedTransformer:
    """`field_rows`: how many rows the embedding of fields has. Raises ConfigError when the model cannot do what `spec`
    wants."""
    if isinstance(config, ModelConfig):
        if config.pretrained and config.pretrained.encoder:
            from mmlm.model.huggingface.encoder import EncoderModel

            return EncoderModel(config, spec)
        return build_model(config, spec, field_rows)
    if isinstance(config, CnnConfig):
        return CnnModel(config, spec, field_rows)
    return RecurrentModel(config, spec, field_rows)
