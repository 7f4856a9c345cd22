"""Text out of tokens, stop texts, choices and JSON: with a real tokenizer and models that know nothing."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from mmlm.data.collate import collate
from mmlm.errors import ConfigError
from mmlm.features.config import TokenizerConfig
from mmlm.features.sample import Sample
from mmlm.features.spec import ANSWER, BOS, FeatureSpec, TaskSpec
from mmlm.features.text import Tokenizer, train_tokenizer
from mmlm.model.answers import Answers
from mmlm.model.config import ModelConfig
from mmlm.model.constrained import Grammar
from mmlm.model.generation import generate, stream
from mmlm.model.generation_config import GenerationConfig
from mmlm.model.pieces import Pieces, cut
from mmlm.model.transformer import FusedTransformer

TEXTS = [
    "Which number is it? 这是哪个数字？ 数字是七。",
    'Das ist schön: {"a": 1, "b": [true, null]}',
    "naïve café 🙂 ok",
]
OURS = train_tokenizer(TEXTS * 5, TokenizerConfig(vocab_size=330))


def foreign() -> Tokenizer:
    """One that did not come from us: no marks, ids of its own."""
    inner = HFTokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(TEXTS * 5, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    return Tokenizer(inner.to_str())


def asked(words: Tokenizer, seed: int, count: int = 4) -> tuple[FusedTransformer, Any]:
    torch.manual_seed(seed)
    spec = FeatureSpec(vocab_size=words.vocab_size, tokenizer_digest="", max_len=64, tasks=[TaskSpec(name="t")])
    net = FusedTransformer(ModelConfig(width=16, layers=1, heads=2), spec).eval()
    net.answer.weight.data *= 10
    questions = [np.array([BOS, *words.encode("?" * n), ANSWER], np.int32) for n in range(1, count + 1)]
    samples = [Sample(f"s{n}", "t", q, len(q) - 1) for n, q in enumerate(questions)]
    return net, collate(samples, spec, pad_left=True, with_answer=False)


@pytest.mark.parametrize("words", [OURS, foreign()], ids=["ours", "foreign"])
@pytest.mark.parametrize("stop", [(), ("字",), ("number is", "schön"), ("\n", " ", "七。")], ids=str)
def test_pieces_join_to_the_text_and_never_end_within_a_character(words: Tokenizer, stop: tuple[str, ...]) -> None:
    rng, given = random.Random(0), 0
    for text in [*TEXTS, "".join(TEXTS), " 这是哪个\n数字 number  isnt number is \n", "🙂🙂 \x00 schö"]:
        for exact in (True, False):
            ids = words.encode(text)
            if not exact:  # single bytes, and some of them broken
                ids = [i for token in ids for i in words.encode(words.decode([token]) or "x")]
                ids[rng.randrange(len(ids))] = rng.randrange(9, 265)
            pieces = Pieces(words.decode, stop)
            made = []
            for token in ids:
                made.append(pieces.push(token))
                if pieces.stopped:
                    break
            made.append(pieces.close())
            assert "".join(made) == cut(words.decode(ids), stop)
            assert pieces.stopped == any(one in words.decode(ids) for one in stop)
            assert not exact or not any(piece.endswith("\ufffd") for piece in made)
            given += sum(map(bool, made))
    assert given > 8, "pieces come one by one"


def test_single_bytes_of_chinese_become_whole_characters() -> None:
    ids = [9 + sorted(pre_tokenizers.ByteLevel.alphabet()).index(c) for c in _visible("这是七")]
    assert OURS.decode(ids) == "这是七"
    pieces = Pieces(OURS.decode)
    assert [pieces.push(token) for token in ids] == ["", "", "这", "", "", "是", "", "", "七"]


def _visible(text: str) -> str:
    """The letters by which a byte-level tokenizer writes the bytes of a text."""
    return "".join(
        piece for piece, _ in pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    )


def test_a_stop_text_ends_an_answer_wherever_tokens_are_cut() -> None:
    net, prompts = asked(OURS, 0)
    config = GenerationConfig(temperature=3.0)
    free = generate(net, prompts, 40, config, words=OURS)
    whole = [OURS.decode(ids) for ids in free.ids]
    stop = whole[0][7:10]
    found = generate(net, prompts, 40, config.model_copy(update={"stop": (stop,)}), words=OURS)
    assert cut(OURS.decode(found.ids[0]), (stop,)) == cut(whole[0], (stop,))
    assert len(found.ids[0]) < len(free.ids[0])
    for ids, before in zip(found.ids, free.ids, strict=True):
        assert ids == before[: len(ids)], "what comes before a stop text is what came without it"
        assert len(ids) == len(before) or stop in OURS.decode(ids)


CHOICES = ("yes", "yes, please", "no (never)", "这是七", 'a "quoted" | one', "🙂", "\\n\n", "#x & y - z")


@pytest.mark.parametrize("words", [OURS, foreign()], ids=["ours", "foreign"])
@pytest.mark.parametrize("settings", [{}, {"temperature": 2.0}, {"beams": 3}], ids=str)
def test_choices_are_always_one_of_them(words: Tokenizer, settings: dict[str, Any]) -> None:
    seen = set()
    for seed in range(6):
        net, prompts = asked(words, seed)
        config = GenerationConfig(choices=CHOICES, **settings)
        for ids in generate(net, prompts, 60, config, words=words, seeds=range(seed * 10, seed * 10 + 4)).ids:
            assert words.decode(ids) in CHOICES
            seen.add(words.decode(ids))
    assert len(seen) > 2


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["数字", "word"]},
        "list": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "count", "kind", "list"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("words", [OURS, foreign()], ids=["ours", "foreign"])
@pytest.mark.parametrize("settings", [{}, {"temperature": 1.5}, {"beams": 2}], ids=str)
def test_json_always_follows_its_schema(words: Tokenizer, settings: dict[str, Any]) -> None:
    for seed in range(3):
        net, prompts = asked(words, seed)
        config = GenerationConfig(json_schema=SCHEMA, **settings)
        for ids in generate(net, prompts, 200, config, words=words, seeds=[1, 2, 3, 4]).ids:
            made = json.loads(words.decode(ids))
            assert sorted(made) == ["count", "kind", "list", "name"]
            assert isinstance(made["name"], str) and len(made["name"]) <= 6
            assert isinstance(made["count"], int) and 0 <= made["count"] <= 99
            assert made["kind"] in ("数字", "word")
            assert len(made["list"]) <= 3 and all(isinstance(x, bool) for x in made["list"])


def test_a_constraint_takes_nothing_from_what_the_model_prefers() -> None:
    """Where the free answer fits the constraint, it stays, and its probability is the same."""
    whole = 0
    for seed in range(12):
        net, prompts = asked(OURS, seed, 1)
        free = generate(net, prompts, 3)
        text = OURS.decode(free.ids[0])
        if "\ufffd" in text:  # bytes that are no text
            continue
        whole += 1
        held = generate(net, prompts, 3, GenerationConfig(choices=(text, "something else")), words=OURS)
        assert held.ids == free.ids
        assert held.log_score_R.item() == pytest.approx(free.log_score_R.item(), abs=1e-4)
    assert whole


@pytest.mark.parametrize("schema", [{"type": "foo"}, {"not": {"type": "string"}}, {"pattern": "(", "type": "string"}])
def test_a_schema_that_cannot_be_followed_is_told(schema: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"generation\.json_schema cannot be followed"):
        Grammar(GenerationConfig(json_schema=schema), OURS)


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 2.0}, {"temperature": 2.0, "stop": ["e", "一"]}, {"beams": 3}, {"choices": CHOICES}],
    ids=str,
)
def test_what_is_streamed_is_what_is_generated(settings: dict[str, Any]) -> None:
    net, prompts = asked(OURS, 5)
    config = GenerationConfig(**settings)
    made = list(stream(net, prompts, 40, config, words=OURS, seeds=[3, 4, 5, 6]))
    last = made.pop()
    wanted = generate(net, prompts, 40, config, words=OURS, seeds=[3, 4, 5, 6])
    assert isinstance(last, Answers) and last.ids == wanted.ids
    texts = ["", "", "", ""]
    for given in made:
        assert not isinstance(given, Answers)
        texts[given[0]] += given[1]
    assert texts == [cut(OURS.decode(ids), config.stop) for ids in wanted.ids]
