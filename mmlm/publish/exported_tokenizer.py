"""The tokenizer of an exported model, as AutoTokenizer of transformers reads it.

In the model our marks are ids 0 to 8, and a given tokenizer's own ids come nine later. Its file is changed so that it says
the same; or, for the form `llama`, its ids stay and our marks come last, as the rows of the exported vocabulary do.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmlm.features.spec import ANSWER, BOS, EOS, PAD, SPECIAL_TOKENS, FeatureSpec
from mmlm.features.text import Tokenizer
from mmlm.storage import write_json

MARK = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
PLAIN = (
    "{% if messages|rejectattr('role', 'in', ['system', 'user'])|list or "
    "messages|selectattr('role', 'eq', 'user')|list|length > 1 %}"
    "{{ raise_exception('this model was taught single questions') }}{% endif %}"
    "BOS{% for message in messages %}{{ message['content'] }}{% if not loop.last %}\n{% endif %}{% endfor %}ANSWER"
)
"""A question as the template `plain` of features.chat lays it out, for `apply_chat_template`."""


def write(tokenizer: Tokenizer, spec: FeatureSpec, folder: Path, *, marks_last: bool) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` into `folder`."""
    names = dict(enumerate(SPECIAL_TOKENS))
    given = json.loads(tokenizer.json)
    if tokenizer.moved:  # names that it cannot have
        names = {i: f"<|mmlm_{name[1:-1]}|>" for i, name in names.items()}
        first = spec.vocab_size - tokenizer.moved if marks_last else 0
        if not marks_last:
            _move(given, list(names.values()))
        marks = [{"id": first + i, "content": name, **MARK} for i, name in names.items()]
        given["added_tokens"] = sorted([*marks, *(given.get("added_tokens") or [])], key=lambda token: token["id"])
    write_json(folder / "tokenizer.json", given)
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": names[BOS],
        "eos_token": names[EOS],
        "pad_token": names[PAD],
        "additional_special_tokens": [name for i, name in names.items() if i not in (BOS, EOS, PAD)],
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "model_max_length": spec.max_len,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    if spec.chat_template == "plain":
        settings["chat_template"] = PLAIN.replace("BOS", names[BOS]).replace("ANSWER", names[ANSWER])
    write_json(folder / "tokenizer_config.json", settings)


def _move(given: dict[str, Any], names: list[str]) -> None:
    """Put `names` before the vocabulary, whose ids grow by as many; what it puts around a text is left out."""
    model, count = given["model"], len(names)
    if isinstance(model["vocab"], dict):
        model["vocab"] = {**{n: i for i, n in enumerate(names)}, **{n: i + count for n, i in model["vocab"].items()}}
    else:  # Unigram: pieces with their log-probabilities
        model["vocab"] = [*([name, -1e4] for name in names), *model["vocab"]]
        if model.get("unk_id") is not None:
            model["unk_id"] += count
    given["added_tokens"] = [{**t, "id": t["id"] + count} for t in given.get("added_tokens") or []]
    given["post_processor"] = None
