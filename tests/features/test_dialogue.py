"""Dialogues are laid out as transformers' apply_chat_template lays them out, media in their turns, the past to spare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from mmlm.corpus.records import Part
from mmlm.data.modalities import keep_modalities
from mmlm.features.chat import CHATML, Chat, Said, find_template
from mmlm.features.config import FeaturesConfig, TokenizerConfig
from mmlm.features.encode import Encoder
from mmlm.features.failures import SampleError
from mmlm.features.spec import AUDIO, CONTEXT, IMAGE, SPECIAL_TOKENS
from mmlm.features.text import Tokenizer, given_tokenizer
from tests.features.test_encode import PICTURE, make_spec, read, record

HEADERS = """{%- for message in messages -%}
  {%- set said = "<|start_header_id|>" ~ message["role"] ~ "<|end_header_id|>\n\n" ~ (message["content"] | trim) -%}
  {{- (bos_token if loop.first else "") ~ said ~ "<|eot_id|>" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|start_header_id|>assistant<|end_header_id|>\n\n" -}}{%- endif -%}"""
"""The form of Llama 3's."""
BRACKETS = """{{- bos_token -}}
{%- for message in messages -%}
  {%- if message.role not in ("user", "assistant") or (message.role == "user") != (loop.index0 is even) -%}
    {{- raise_exception("user and assistant take turns") -}}
  {%- endif -%}
  {{- "[INST] " ~ message.content ~ " [/INST]" if message.role == "user" else message.content ~ eos_token -}}
{%- endfor -%}"""
"""The form of Mistral's: no system, and turns must alternate."""
PREFACED = """{%- for message in messages -%}
  {%- if loop.first and message.role != "system" -%}{{- "<|im_start|>system\nYou help.<|im_end|>\n" -}}{%- endif -%}
  {{- "<|im_start|>" ~ message.role ~ "\n" ~ message.content ~ "<|im_end|>\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|im_start|>assistant\n" -}}{%- endif -%}"""
"""The form of Qwen's: words of its own where nobody gives a system's."""
TEMPLATES = {"chatml": CHATML, "headers": HEADERS, "brackets": BRACKETS, "prefaced": PREFACED}
MARKS = [
    "<s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "[INST]",
    "[/INST]",
]
TALK = [
    "Who lives in the oak?",
    "An owl, 一只猫头鹰.",
    "And in the lake?",
    "A pike\nand two frogs.",
    "Which of them sings?",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with the marks of all templates as special tokens, as other people save it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    other = HFTokenizer(models.BPE())
    other.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    other.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    other.train_from_iterator(
        TALK, trainers.BpeTrainer(vocab_size=400, special_tokens=MARKS, initial_alphabet=alphabet, show_progress=False)
    )
    other.save(str(folder / "tokenizer.json"))
    return folder


def chat(folder: Path, name: str) -> tuple[Chat, Tokenizer]:
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "bos_token": "<s>"}))
    (folder / "chat_template.jinja").write_text(TEMPLATES[name])
    tokenizer = given_tokenizer(str(folder / "tokenizer.json"))
    config = FeaturesConfig(tokenizer=TokenizerConfig(file=str(folder / "tokenizer.json")), chat_template="tokenizer")
    return Chat(find_template(config), tokenizer), tokenizer


def theirs(folder: Path, name: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|im_end|>")
    tokenizer.chat_template = TEMPLATES[name]
    return tokenizer


def talk(turns: int, system: bool = False) -> list[Said]:
    said = [Said(("user", "assistant")[i % 2], TALK[i], turn=i + 1 - turns) for i in range(turns)]
    return [Said("system", "Be kind.", turn=-turns), *said] if system else said


@pytest.mark.parametrize("turns", [1, 3, 5])
@pytest.mark.parametrize("name", TEMPLATES)
def test_as_transformers_lays_them_out(folder: Path, name: str, turns: int) -> None:
    laid, tokenizer = chat(folder, name)
    for system in (False, True):
        said = talk(turns, system)
        if system and name == "brackets":
            with pytest.raises(SampleError, match="take turns"):
                laid.lay_out(said)
            continue
        prompt = laid.lay_out(said)
        other = theirs(folder, name)
        messages = [{"role": s.role, "content": s.text} for s in said]
        told = {"add_generation_prompt": True, "bos_token": ""}
        text = other.apply_chat_template(messages, tokenize=False, **told)
        assert tokenizer.decode(prompt.ids).encode() == text.encode()
        # and token by token: the marks are single tokens on both sides
        assert [i - len(SPECIAL_TOKENS) for i in prompt.ids] == other(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("turns", [1, 3, 5])
@pytest.mark.parametrize("name", ["chatml", "headers", "prefaced"])
def test_without_the_past_the_question_stands_alone(folder: Path, name: str, turns: int) -> None:
    laid, _ = chat(folder, name)
    for system in (False, True):
        prompt = laid.lay_out(talk(turns, system))
        left = [i for at, i in enumerate(prompt.ids) if not any(a <= at < b for a, b in prompt.spans)]
        alone = [*talk(1, system)[:-1], Said("user", TALK[turns - 1])]
        assert left == laid.lay_out(alone).ids


def test_where_turns_cannot_be_told_apart_only_what_was_said_goes(folder: Path) -> None:
    laid, tokenizer = chat(folder, "brackets")
    (folder / "chat_template.jinja").write_text(
        "{{ messages | length }}{% for m in messages %}[{{ m.content }}]{% endfor %}"
    )
    odd = Chat((folder / "chat_template.jinja").read_text(), tokenizer).lay_out(talk(3))
    left = [i for at, i in enumerate(odd.ids) if not any(a <= at < b for a, b in odd.spans)]
    assert tokenizer.decode(odd.ids) == "3" + "".join(f"[{t}]" for t in TALK[:3])
    assert tokenizer.decode(left) == f"3[][][{TALK[2]}]"
    assert laid.lay_out(talk(3)).ids != odd.ids


def test_media_stand_in_their_turns_and_stay_when_the_past_goes(folder: Path) -> None:
    _, tokenizer = chat(folder, "chatml")
    sound = Part("audio", uri="a.wav", turn=-2)
    parts = (
        Part("text", "context", "A caption."),
        Part("text", "system", "Be kind.", turn=-3),
        Part("text", text="Look:", turn=-2), Part("image", uri="a.png", turn=-2), Part("text", text="and hear", turn=-2),
        sound, Part("text", "assistant", "An owl.", turn=-1),
        Part("text", text="And here?"), PICTURE,
    )  # fmt: skip
    encoder = Encoder(make_spec(tokenizer, chat_template="chatml", max_len=400), tokenizer)
    sample = encoder.encode(record(*parts), read)
    assert (len(sample.images), len(sample.sounds)) == (2, 1)

    def shown(tokens: Any) -> str:
        return "".join(
            {IMAGE: "[I]", AUDIO: "[A]", CONTEXT: "[C]"}.get(int(t)) or tokenizer.decode([int(t)]) for t in tokens
        )

    turns = [
        "[C]A caption.", "<|im_start|>system\nBe kind.<|im_end|>\n", "<|im_start|>user\nLook:[I]\nand hear[A]<|im_end|>\n",
        "<|im_start|>assistant\nAn owl.<|im_end|>\n", "<|im_start|>user\nAnd here?[I]<|im_end|>\n<|im_start|>assistant\n",
    ]  # fmt: skip
    assert shown(sample.tokens[1 : sample.answer_at]) == "".join(turns)
    assert not any(int(sample.tokens[i]) in (IMAGE, AUDIO) for a, b in sample.context_spans for i in range(a, b))
    bare = keep_modalities(sample, {"image", "audio"})
    assert shown(bare.tokens[1 : bare.answer_at]) == turns[1] + "[I][A]" + turns[4]
    deaf = keep_modalities(sample, {"context", "image"})
    assert shown(deaf.tokens[1 : deaf.answer_at]) == "".join(turns).replace("[A]", "")
    again = keep_modalities(deaf, {"image"})
    assert shown(again.tokens[1 : again.answer_at]) == turns[1] + "[I]" + turns[4]


def test_plain_stays_as_it_was(folder: Path) -> None:
    _, tokenizer = chat(folder, "chatml")
    prompt = Chat("plain", tokenizer).lay_out(
        [Said("system", "Be kind.", turn=-3), *talk(3)[:2], Said("user", slots=(IMAGE,), turn=-2), Said("user", "So?")]
    )
    encode = tokenizer.encode
    first, second = [CONTEXT, *encode(TALK[0])], [CONTEXT, *encode(TALK[1])]
    assert prompt.ids == [*first, *second, IMAGE, *encode("Be kind.\nSo?")]
    assert prompt.spans == [(0, len(first)), (len(first), len(first) + len(second))]
