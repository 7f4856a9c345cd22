"""A BERT-style encoder of transformers that reads the text of a record and tells its classes apart.

The class head reads the mean over the tokens (Reimers & Gurevych 2019, section 3), since not every encoder was trained to
say something at its first one. Marks of ours and media are not read; text is not answered.

Axes: B sequence, T position, X valid position, R record, L text token with begin and end, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mmlm.errors import ConfigError
from mmlm.features.spec import SPECIAL_TOKENS, FeatureSpec
from mmlm.model.config import ModelConfig
from mmlm.model.cross_entropy import AnswerLoss, Lead
from mmlm.model.recompute import Granularity
from mmlm.model.transformer import IGNORE, FusedTransformer, Inputs, Output

KINDS = ("bert", "roberta", "xlm-roberta")
"""`model_type` of the encoders that are known."""
MOVED = len(SPECIAL_TOKENS)


class EncoderModel(FusedTransformer):
    """Built as a FusedTransformer from a config whose `pretrained.encoder` is settled."""

    generates = False

    def __init__(self, config: ModelConfig, spec: FeatureSpec) -> None:
        nn.Module.__init__(self)
        require_classes(spec)
        assert config.pretrained is not None and config.pretrained.encoder is not None
        settings = config.pretrained.encoder
        self.config, self.vocabulary = config, spec.vocab_size
        self.begin, self.end, self.padding = settings.begin, settings.end, settings.padding
        self.encoder = empty_encoder(settings.settings, config.dropout)
        self.blocks = nn.ModuleList()
        self.embedding = None
        self.label = nn.Linear(config.width, spec.head_rows)
        nn.init.normal_(self.label.weight, std=0.02)
        nn.init.zeros_(self.label.bias)

    @property
    def words(self) -> nn.Embedding:
        """The table of the encoder's own tokens."""
        table: nn.Embedding = self.encoder.get_input_embeddings()
        return table

    def set_up(self, *, recompute: int = 0, granularity: Granularity = "full", compiled: bool = False) -> None:
        if recompute or compiled:
            raise ConfigError("recompute or compile for an encoder", wanted="recompute: 0 and compile: false")

    def forward(self, batch: Inputs, z_loss: float | None = None, lead: Lead | None = None) -> Output:
        """There is no head over the vocabulary: the loss of the answers is 0, their logits are all alike."""
        label_RC = self.label(self.records(batch))
        A = int((batch.target_BT != IGNORE).sum())
        if z_loss is None:
            return Output(label_RC.new_zeros(A, self.vocabulary), label_RC)
        none_A = label_RC.new_zeros(A, dtype=torch.float32)
        return Output(label_RC.new_empty(0, self.vocabulary), label_RC, AnswerLoss(none_A.sum(), none_A, none_A))

    def read_prompts(self, batch: Inputs, caches: list[Any]) -> torch.Tensor:
        return self.records(batch)

    def records(self, batch: Inputs) -> torch.Tensor:
        """(R, D): what stands for each record, in order of their `<answer>` marks."""
        ids_RL, read_RL = self.texts(batch)
        x_RLD = self.encoder(input_ids=ids_RL, attention_mask=read_RL.long()).last_hidden_state
        weight_RL1 = read_RL[..., None].to(x_RLD.dtype)
        return (x_RLD * weight_RL1).sum(1) / weight_RL1.sum(1)

    def texts(self, batch: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """The encoder's own ids of each record's question, padded, and which of them are real."""
        T = batch.tokens_BT.shape[1]
        row_R, segment_R = batch.answer_at_R // T, batch.segment_BT.flatten()[batch.answer_at_R]
        same_RT = batch.segment_BT[row_R] == segment_R[:, None]
        text_RT = same_RT & batch.prompt_BT[row_R] & (batch.tokens_BT[row_R] >= MOVED)
        length_R = text_RT.sum(1)
        L = int(length_R.max()) + 2
        ids_RL = torch.full((len(row_R), L), self.padding, device=row_R.device)
        number_L = torch.arange(L, device=row_R.device)
        inside_RL = (number_L >= 1) & (number_L <= length_R[:, None])
        ids_RL[inside_RL] = batch.tokens_BT[row_R][text_RT] - MOVED
        ids_RL[:, 0] = self.begin
        ids_RL.scatter_(1, length_R[:, None] + 1, self.end)
        return ids_RL, number_L <= length_R[:, None] + 1


def refuse(config: ModelConfig, spec: FeatureSpec) -> None:
    """Raise ConfigError for what an encoder of texts would pass over."""
    unread = [name for name in ("image", "audio", "fields") if getattr(spec, name)]
    if unread:
        raise ConfigError(
            f"an encoder of texts for records with {' and '.join(unread)}", wanted="records of text alone",
            cure="give a causal language model as model.pretrained.folder, or take the media out of shard.yaml",
        )  # fmt: skip
    if config.embedding:
        raise ConfigError(
            "model.embedding on an encoder of texts", wanted="a model that reads what is to be brought together",
            cure="leave model.embedding away, or train a transformer, lstm, gru or cnn",
        )  # fmt: skip
    if config.layout != "decoder" or config.fusion.kind != "concat":
        raise ConfigError(
            f"layout {config.layout} with fusion {config.fusion.kind} on an encoder of texts",
            wanted="neither: its form is that of its folder", cure="leave model.layout and model.fusion away",
        )  # fmt: skip


def empty_encoder(settings: dict[str, Any], dropout: float) -> Any:
    """The encoder of a config.json, its weights still at random. Raises ConfigError when transformers is missing."""
    try:
        from transformers import AutoConfig, AutoModel
    except ImportError:
        raise ConfigError(
            "an encoder needs transformers, which is not installed", cure="pip install 'mmlm-workflows[pretrained]'"
        ) from None
    plain = {key: value for key, value in settings.items() if key != "model_type"}
    config = AutoConfig.for_model(settings["model_type"], **plain)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
    return AutoModel.from_config(config, add_pooling_layer=False, attn_implementation="sdpa")


def require_classes(spec: FeatureSpec) -> None:
    """Raise ConfigError for tasks that a class head cannot answer."""
    for task in spec.tasks:
        if task.has_text or not (task.labels or task.number):
            raise ConfigError(
                f"the task {task.name} is answered in words", wanted="classes or a number: an encoder says nothing else",
                cure="give a causal language model as train.model.pretrained.folder",
            )  # fmt: skip
