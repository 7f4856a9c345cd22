"""The whole model as a class of transformers: what `AutoModel.from_pretrained(DIR, trust_remote_code=True)` gives.

`mmlm export --format hf` puts this file and those that it needs into the folder, so that mmlm need not be installed. What
writes words is an MmlmForConditionalGeneration, what only tells classes apart an MmlmForSequenceClassification; both take
the same inputs:

- `input_ids` (B, T): text with pictures, sounds and fields in it. A picture is as many `<image>` ids as it has patches, a
  sound as many `<audio>` ids as it has mel tokens, fields as many `<fields>` ids as there are. A question ends with
  `<answer>`, behind which the answer is written, by layout encoder_decoder too: `generate` gives question and answer.
- `attention_mask` (B, T): 0 where a sequence is padded, on whichever side.
- the features of the media, in order of their slots, sequence by sequence: `patches` (P, D), flattened patches of pictures on
  the spec's scale, and `patch_at` (P,), their numbers in the picture, row by row, both as `picture_patches` makes them;
  `mels` (M, D), rows of stacked log-mel frames, the stored value times -2 / floor plus 1 where the sound's scale is relative,
  and `mel_at` (M,), their numbers in the sound; `values` (K,), standardised numbers, and 1 for the category that is present,
  and `value_at` (K,), the numbers of their fields.

Axes: B sequence, T position, X valid position, U position that is read, V vocabulary, C classes and numbers of all tasks,
E values of an embedding, P patch, M mel token, K field value, D values of a patch or mel token; H, W, C row, column and
channel of a picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from pydantic import TypeAdapter
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from mmlm.features.borders import border_of
from mmlm.features.spec import ANSWER, AUDIO, FIELDS, IMAGE, FeatureSpec
from mmlm.model.baseline_config import AnyModelConfig
from mmlm.model.kinds import build
from mmlm.model.layouts import EncoderDecoder, source_of
from mmlm.model.transformer import IGNORE


class MmlmConfig(PreTrainedConfig):
    """`model` holds the settings of the model, `spec` what it reads: the folder's other JSON files in one."""

    model_type = "mmlm"

    def __init__(
        self,
        model: dict[str, Any] | None = None,
        spec: dict[str, Any] | None = None,
        field_rows: int = 0,
        **others: Any,
    ) -> None:
        self.model, self.spec, self.field_rows = model or {}, spec or {}, field_rows
        super().__init__(**others)


@dataclass
class MmlmOutput(ModelOutput):
    loss: torch.Tensor | None = None
    """Mean cross-entropy of the next token over the labels that are not -100."""
    logits: torch.Tensor | None = None
    """(B, T, V); zeros where a sequence is padded, and where only an encoder reads. Of MmlmForSequenceClassification
    `label_logits` once more."""
    label_logits: torch.Tensor | None = None
    """(B, C), read at `<answer>`, or by a decoder alone at the last token where there is none; `config.id2label` names the
    columns."""
    embeddings: torch.Tensor | None = None
    """(B, E), of length 1, read at the same place; where the model has an embedding head."""


@dataclass
class _Inputs:
    """What the models of mmlm read."""

    tokens_BT: torch.Tensor
    valid_BT: torch.Tensor
    prompt_BT: torch.Tensor
    target_BT: torch.Tensor
    segment_BT: torch.Tensor
    position_BT: torch.Tensor
    answer_at_R: torch.Tensor
    patches_PD: torch.Tensor
    patch_at_P: torch.Tensor
    mels_MD: torch.Tensor
    mel_at_M: torch.Tensor
    values_K: torch.Tensor
    value_at_K: torch.Tensor


class MmlmPreTrainedModel(PreTrainedModel):
    """What both classes share: the model of mmlm as `net`, and how its inputs are made."""

    config_class = MmlmConfig
    main_input_name = "input_ids"

    def __init__(self, config: MmlmConfig) -> None:
        super().__init__(config)
        spec = FeatureSpec.model_validate(config.spec)
        self.net = build(TypeAdapter(AnyModelConfig).validate_python(config.model), spec, config.field_rows)
        image, audio = spec.encoder("image"), spec.encoder("audio")
        self.widths = (
            image.dim if image else spec.image.patch_dim if spec.image else 1,
            audio.dim if audio else spec.audio.token_dim if spec.audio else 1,
            0,
        )
        """Values of a patch, of a mel token; of a field there is one, without an axis."""
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        """`net` has done so."""

    @torch.no_grad()
    def get_embeddings(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **media: torch.Tensor
    ) -> torch.Tensor:
        """(B, E), of length 1 and without gradients, of `<bos>`, media and texts, `<answer>`: what means the same lies near,
        whichever of them is given. There is no question; a text begins with `<context>`. Raises ValueError for a model without an
        embedding head."""
        made: torch.Tensor | None = self.net(self._inputs(input_ids, attention_mask, **media)).embedding_RE
        if made is None:
            raise ValueError("this model has no embedding head; wanted one that was trained with model.embedding")
        return made

    def picture_patches(self, picture_HWC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`patches` and `patch_at` of one picture: uint8, `size` pixels a side, of the channels that `config.spec["image"]`
        names. Its `scale` says what pixels become: `fixed`, (value - 127.5) / 63.75, so that black is -2 and white 2 in all
        pictures; `relative`, (value - mean) / (deviation + 0.255) over all pixels and channels of this one. With `padding`
        `drop` the patches of uniform edges are left out, and there are as many fewer `<image>` ids."""
        spec = FeatureSpec.model_validate(self.config.spec).image
        if spec is None or picture_HWC.shape != (spec.size, spec.size, spec.channels):
            wanted = f"{(spec.size, spec.size, spec.channels)}" if spec else "no picture"
            raise ValueError(f"a picture of shape {tuple(picture_HWC.shape)}; wanted {wanted}")
        x_HWC, n, p = picture_HWC.float(), spec.size // spec.patch, spec.patch
        if spec.scale == "fixed":
            x_HWC = (x_HWC - 127.5) / 63.75
        else:
            x_HWC = (x_HWC - x_HWC.mean()) / (x_HWC.std(correction=0) + 1e-3 * 255)
        patches_PD = x_HWC.view(n, p, n, p, spec.channels).transpose(1, 2).reshape(spec.tokens, spec.patch_dim)
        rows, columns = border_of(picture_HWC.cpu().numpy(), spec)
        place_NN = torch.arange(spec.tokens, device=picture_HWC.device).view(n, n)
        kept_P = place_NN[rows : n - rows, columns : n - columns].flatten()
        return patches_PD[kept_P], kept_P

    def _inputs(
        self, ids_BT: torch.Tensor, attention_mask: torch.Tensor | None, patches: Any = None, patch_at: Any = None,
        mels: Any = None, mel_at: Any = None, values: Any = None, value_at: Any = None,
    ) -> _Inputs:  # fmt: skip
        valid_BT = torch.ones_like(ids_BT, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        answers_BT = (ids_BT == ANSWER) & valid_BT
        answered_B1 = answers_BT.any(1, keepdim=True)
        if (not self.net.generates or isinstance(self.net, EncoderDecoder)) and not bool(answered_B1.all()):
            raise ValueError(
                f"{int((~answered_B1).sum())} sequences have no <answer>; wanted one where each question ends"
            )
        slot_BT = (ids_BT == IMAGE) | (ids_BT == AUDIO) | (ids_BT == FIELDS)
        prompt_BT = torch.where(answered_B1, answers_BT.cumsum(1) - answers_BT.int() == 0, slot_BT) & valid_BT
        number_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        last_B = torch.where(answered_B1[:, 0], answers_BT.int().argmax(1), (number_T * valid_BT).argmax(1))
        rows = []
        for features, at, width in zip((patches, mels, values), (patch_at, mel_at, value_at), self.widths, strict=True):
            empty = ids_BT.new_zeros((0, width) if width else 0, dtype=self.dtype)
            rows += [empty if features is None else features.to(self.dtype), ids_BT.new_zeros(0) if at is None else at]
        return _Inputs(
            ids_BT, valid_BT, prompt_BT, torch.full_like(ids_BT, IGNORE),
            torch.where(valid_BT, 0, -1), (valid_BT.cumsum(1) - 1).clamp_min(0),
            torch.arange(len(ids_BT), device=ids_BT.device) * ids_BT.shape[1] + last_B, *rows,
        )  # fmt: skip


class MmlmForConditionalGeneration(MmlmPreTrainedModel, GenerationMixin):
    """Writes words, and tells classes apart."""

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        patches: torch.Tensor | None = None,
        patch_at: torch.Tensor | None = None,
        mels: torch.Tensor | None = None,
        mel_at: torch.Tensor | None = None,
        values: torch.Tensor | None = None,
        value_at: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **_: Any,
    ) -> MmlmOutput:
        """`labels` (B, T) are the ids themselves, -100 where nothing is learnt."""
        batch = self._inputs(input_ids, attention_mask, patches, patch_at, mels, mel_at, values, value_at)
        written_BT = batch.valid_BT
        if isinstance(self.net, EncoderDecoder):
            written_BT = written_BT & ~source_of(batch)
        x_UD = self.net.trunk(batch, written_BT[batch.valid_BT])
        logits_UV = self.net.answer(x_UD)
        logits = logits_UV.new_zeros(*input_ids.shape, logits_UV.shape[-1])
        logits[written_BT] = logits_UV
        at_R = (written_BT.flatten().cumsum(0) - 1)[batch.answer_at_R]
        label_logits, embeddings = self.net.classify(x_UD[at_R])
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORE)
        return MmlmOutput(loss=loss, logits=logits, label_logits=label_logits, embeddings=embeddings)

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: torch.Tensor, **kwargs: Any
    ) -> dict[str, Any]:
        """The whole sequence at every step: slow and right; `mmlm predict` has a cache."""
        kept = ("attention_mask", "patches", "patch_at", "mels", "mel_at", "values", "value_at")
        return {"input_ids": input_ids, **{key: kwargs[key] for key in kept if kwargs.get(key) is not None}}


class MmlmForSequenceClassification(MmlmPreTrainedModel):
    """Tells classes apart and gives numbers; writes nothing."""

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        patches: torch.Tensor | None = None,
        patch_at: torch.Tensor | None = None,
        mels: torch.Tensor | None = None,
        mel_at: torch.Tensor | None = None,
        values: torch.Tensor | None = None,
        value_at: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **_: Any,
    ) -> MmlmOutput:
        """Raises ValueError for `labels`: several tasks share the columns, and each has a loss of its own."""
        if labels is not None:
            raise ValueError(
                "labels were given; wanted none: compute the loss from the columns of your task (config.id2label)"
            )
        made = self.net(self._inputs(input_ids, attention_mask, patches, patch_at, mels, mel_at, values, value_at))
        return MmlmOutput(logits=made.label_RC, label_logits=made.label_RC, embeddings=made.embedding_RE)
