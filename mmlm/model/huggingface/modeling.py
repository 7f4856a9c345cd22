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
from mmlm.features.spec import ANSWER, FeatureSpec
from mmlm.model.baseline_config import AnyModelConfig
from mmlm.model.huggingface.cache import MEDIA, Media, MmlmCache, Sequences, chosen, prompts_of
from mmlm.model.kinds import build
from mmlm.model.layouts import EncoderDecoder, source_of
from mmlm.model.transformer import IGNORE


class MmlmConfig(PreTrainedConfig):
    """`model` holds the settings of the model, `spec` what it reads: the folder's other JSON files in one."""

    model_type = "mmlm"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        model: dict[str, Any] | None = None,
        spec: dict[str, Any] | None = None,
        field_rows: int = 0,
        **others: Any,
    ) -> None:
        self.model, self.spec, self.field_rows = model or {}, spec or {}, field_rows
        self.use_cache: bool = others.pop("use_cache", True)
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
    columns. None, as `embeddings`, where a cache went on by one token."""
    embeddings: torch.Tensor | None = None
    """(B, E), of length 1, read at the same place; where the model has an embedding head."""
    past_key_values: MmlmCache | None = None
    """What the next token goes on from, where that was asked for."""


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
        valid_BT = _valid(ids_BT, attention_mask)
        answers_BT = (ids_BT == ANSWER) & valid_BT
        answered_B1 = answers_BT.any(1, keepdim=True)
        if (not self.net.generates or isinstance(self.net, EncoderDecoder)) and not bool(answered_B1.all()):
            raise ValueError(
                f"{int((~answered_B1).sum())} sequences have no <answer>; wanted one where each question ends"
            )
        number_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        last_B = torch.where(answered_B1[:, 0], answers_BT.int().argmax(1), (number_T * valid_BT).argmax(1))
        rows = []
        for features, at, width in zip((patches, mels, values), (patch_at, mel_at, value_at), self.widths, strict=True):
            empty = ids_BT.new_zeros((0, width) if width else 0, dtype=self.dtype)
            rows += [empty if features is None else features.to(self.dtype), ids_BT.new_zeros(0) if at is None else at]
        return _Inputs(
            ids_BT, valid_BT, prompts_of(ids_BT, valid_BT), torch.full_like(ids_BT, IGNORE),
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
        past_key_values: MmlmCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> MmlmOutput:
        """`labels` (B, T) are the ids themselves, -100 where nothing is learnt.

        With `use_cache`, by default what the config says where no gradients and no labels are, `past_key_values` of what comes
        out is what `input_ids` of the next call go on from, alone or with a mask of all positions. `logits_to_keep`: only
        those of so many last positions of each sequence, padding not counted; 0 for all.
        """
        media = _given(patches=patches, patch_at=patch_at, mels=mels, mel_at=mel_at, values=values, value_at=value_at)
        cache, new = _checked(past_key_values), input_ids.shape[1]
        if cache is None and (self._usually_cached(labels) if use_cache is None else use_cache):
            cache = MmlmCache()
        given = Sequences(input_ids, _valid(input_ids, attention_mask), media)
        if cache is not None and cache.get_seq_length():
            if media or labels is not None:
                raise ValueError(
                    "media or labels where a cache goes on; wanted the whole sequence, without past_key_values"
                )
            x_BD = cache.extend(self.net, input_ids, attention_mask)
            if x_BD is not None:
                return MmlmOutput(logits=self.net.answer(x_BD)[:, None], past_key_values=cache)
            given = cache.with_more(input_ids, attention_mask)
        made = self._whole(given, cache, new, logits_to_keep)
        if labels is not None:
            logits = made.logits[:, :-1].flatten(0, 1).float()  # type: ignore[index]
            made.loss = F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=IGNORE)
        return made

    def _usually_cached(self, labels: torch.Tensor | None) -> bool:
        return bool(self.config.use_cache) and labels is None and not torch.is_grad_enabled()

    def _whole(self, given: Sequences, cache: MmlmCache | None, new: int, keep: int) -> MmlmOutput:
        """One pass over whole sequences, which fills `cache`: logits of the `new` last columns, or of `keep` positions."""
        batch = self._inputs(given.ids, given.valid, **given.media)
        written_BT = batch.valid_BT
        if isinstance(self.net, EncoderDecoder):
            written_BT = written_BT & ~source_of(batch)
        column_BT = _columns(batch.valid_BT, new, keep)
        read_BT = written_BT & (column_BT >= 0)
        logits_X, answer_R = read_BT[batch.valid_BT], (batch.valid_BT.flatten().cumsum(0) - 1)[batch.answer_at_R]
        read_X = logits_X.index_fill(0, answer_R, True)
        x_UD = self._trunk(given, batch, read_X, cache)
        at_U = read_X.cumsum(0) - 1
        logits_UV = self.net.answer(x_UD[at_U[logits_X]])
        logits = logits_UV.new_zeros(len(given.ids), keep or new, logits_UV.shape[-1])
        logits[read_BT.nonzero()[:, 0], column_BT[read_BT]] = logits_UV
        label_logits, embeddings = self.net.classify(x_UD[at_U[answer_R]])
        return MmlmOutput(logits=logits, label_logits=label_logits, embeddings=embeddings, past_key_values=cache)

    def _trunk(self, given: Sequences, batch: _Inputs, read_X: torch.Tensor, cache: MmlmCache | None) -> torch.Tensor:
        """Hidden states (U, F) of the positions to read. Where a decoder has begun to write behind `<answer>`, its blocks keep
        nothing, and the next step reads everything again."""
        if cache is None:
            return self.net.trunk(batch, read_X)
        blocks = cache.empty_blocks(self.net)
        if not isinstance(self.net, EncoderDecoder):
            x_UD = self.net.fusion.trunk(self.net, batch, read_X, blocks)
        elif int((batch.valid_BT & ~source_of(batch)).sum()) == len(given.ids):  # of each, `<answer>` alone
            x_UD = self.net.read_prompts(batch, blocks)
        else:
            x_UD, blocks = self.net.trunk(batch, read_X), []
        cache.keep(given, blocks)
        return x_UD

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: torch.Tensor, next_sequence_length: int | None = None, past_key_values: MmlmCache | None = None,
        attention_mask: torch.Tensor | None = None, is_first_iteration: bool = False, **kwargs: Any,
    ) -> dict[str, Any]:  # fmt: skip
        """What the cache does not hold yet; all of it where the whole sequences are given once more to begin with."""
        told = {key: kwargs[key] for key in ("use_cache", "logits_to_keep") if kwargs.get(key) is not None}
        if past_key_values is not None and past_key_values.get_seq_length():
            if is_first_iteration and next_sequence_length is not None:
                past_key_values.reset()
            elif next_sequence_length is not None:
                input_ids = input_ids[:, -next_sequence_length:]
        if past_key_values is None or not past_key_values.get_seq_length() or is_first_iteration:
            told |= {key: kwargs[key] for key in MEDIA if kwargs.get(key) is not None}
        return {"input_ids": input_ids, "attention_mask": attention_mask, "past_key_values": past_key_values, **told}

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], *_: Any
    ) -> None:
        """`generate` begins with an empty cache of ours, or with the one that it is given. Raises ValueError for another kind."""
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise ValueError(f"cache_implementation {kind!r}; wanted none: this model has a cache of its own")
        if generation_config.prefill_chunk_size is not None:
            raise ValueError("prefill_chunk_size; wanted none: a prompt is read in one pass")
        cache = _checked(model_kwargs.get("past_key_values"))
        if cache is not None:
            cache._is_user_defined = True
        elif generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = MmlmCache()

    def _expand_inputs_for_generation(  # type: ignore[override]
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **model_kwargs: Any
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Each sequence `expand_size` times, with its media."""
        media = _given(**{key: model_kwargs.pop(key, None) for key in MEDIA})
        if expand_size > 1 and media:
            valid_BT = _valid(input_ids, model_kwargs.get("attention_mask"))
            rows = [row for row in range(len(input_ids)) for _ in range(expand_size)]
            media = chosen(Sequences(input_ids, valid_BT, media), rows).media
        input_ids, model_kwargs = super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        return input_ids, {**model_kwargs, **media}


def _valid(ids_BT: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    return torch.ones_like(ids_BT, dtype=torch.bool) if attention_mask is None else attention_mask.bool()


def _given(**media: torch.Tensor | None) -> Media:
    return {key: rows for key, rows in media.items() if rows is not None}


def _checked(cache: Any) -> MmlmCache | None:
    """Raises ValueError for a cache of another kind."""
    if cache is None or isinstance(cache, MmlmCache):
        return cache
    raise ValueError(
        f"past_key_values is a {type(cache).__name__}; wanted what `model(..., use_cache=True)` or `generate` gave, or none"
    )


def _columns(valid_BT: torch.Tensor, new: int, keep: int) -> torch.Tensor:
    """(B, T) int64: the column of the logits that stands for a position, below 0 for none. Of `keep` positions, the last
    valid ones of each sequence; else of the `new` last ones."""
    if keep:
        return torch.where(valid_BT, keep - valid_BT.flip(1).cumsum(1).flip(1), -1)
    T = valid_BT.shape[1]
    return (torch.arange(T, device=valid_BT.device) - (T - new)).expand_as(valid_BT)


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
