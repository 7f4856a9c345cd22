"""A BERT-style encoder's folder: what it says of its shape, and its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mmlm.errors import ConfigError
from mmlm.features.spec import FeatureSpec
from mmlm.model.config import EncoderSettings
from mmlm.model.huggingface.encoder import KINDS, EncoderModel, require_classes

__all__ = ["KINDS", "fields", "load"]
KEPT = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
        "hidden_act", "max_position_embeddings", "type_vocab_size", "layer_norm_eps", "pad_token_id")  # fmt: skip
"""What of a config.json makes the encoder what it is."""
MARKS = {
    "bert": ("[CLS]", "[SEP]", "[PAD]"),
    "roberta": ("<s>", "</s>", "<pad>"),
    "xlm-roberta": ("<s>", "</s>", "<pad>"),
}


def fields(
    settings: Mapping[str, Any], tokenizer: Mapping[str, Any], where: str, spec: FeatureSpec
) -> tuple[dict[str, Any], EncoderSettings]:
    """The fields of ModelConfig that an encoder decides, for what is counted and planned, and its settings.

    Raises ConfigError when it cannot read the shards of `spec`, or when something is missing.
    """
    require_classes(spec)
    kind = settings["model_type"]
    ids = {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or []}
    if missing := [name for name in MARKS[kind] if name not in ids]:
        raise ConfigError(
            f"the tokenizer.json of {where} has no {missing[0]}", wanted="begin, end and padding of its kind"
        )
    begin, end, padding = (ids[name] for name in MARKS[kind])
    try:
        heads, width = int(settings["num_attention_heads"]), int(settings["hidden_size"])
        longest = int(settings["max_position_embeddings"]) - (0 if kind == "bert" else padding + 1)
        found = {
            "width": width, "layers": int(settings["num_hidden_layers"]), "heads": heads, "kv_heads": heads,
            "mlp_width": int(settings["intermediate_size"]), "mlp": "gelu", "norm": "layer", "norm_at": "after",
            "positions": "learned", "qk_norm": False, "attention_bias": "all", "attention": "prefix",
        }  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"config.json of {where} cannot be used ({error})") from None
    if spec.max_len > longest:
        raise ConfigError(
            f"features.max_len = {spec.max_len}", wanted=f"at most {longest}, the positions that {where} knows",
            cure="lower features.max_len and make the shards again",
        )  # fmt: skip
    kept = {name: settings[name] for name in KEPT if settings.get(name) is not None}
    return found, EncoderSettings(settings=kept, begin=begin, end=end, padding=padding)


def load(model: EncoderModel, theirs: Mapping[str, torch.Tensor], where: str) -> None:
    """Set the encoder's weights; a head or a pooler in the folder is left there. Raises ConfigError when one lacks."""
    wanted = model.encoder.state_dict()
    prefix = next((p for p in ("", "bert.", "roberta.") if f"{p}embeddings.word_embeddings.weight" in theirs), "")
    found = {}
    for name, tensor in wanted.items():
        given = name if name in theirs or not prefix else prefix + name
        if given not in theirs and name.endswith(("position_ids", "token_type_ids")):
            continue  # numbers in order, which some files hold
        if given not in theirs or theirs[given].shape != tensor.shape:
            what = "lack" if given not in theirs else "have another shape of"
            raise ConfigError(
                f"the weights in {where} {what} {given}", wanted="every tensor that its config.json calls for",
                cure="use a whole checkpoint",
            )  # fmt: skip
        found[name] = theirs[given].float()
    model.encoder.load_state_dict(found, strict=False)
