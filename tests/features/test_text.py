from __future__ import annotations

import pickle
import random

import pytest
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import models, pre_tokenizers, trainers

from mmlm.errors import ArtifactError, ConfigError
from mmlm.features.config import TokenizerConfig
from mmlm.features.spec import SPECIAL_TOKENS
from mmlm.features.text import Tokenizer, given_tokenizer, train_tokenizer

CORPUS = ["Which number is it?", "这是哪个数字？", "Une grenouille.", "Жаба.", "It is 7."] * 20
CONFIG = TokenizerConfig(vocab_size=400)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(CORPUS, CONFIG)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "Which number is it?",
        "这是哪个数字？",
        "🐸👩‍👩‍👧 e\u0301 \u202eabc",
        "a\0b\r\n\t  c",
        "ｆｕｌｌ ﬁ ½",
        "\ufeffא ب ก",
    ],
)
def test_any_text_comes_back_exactly(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(len(SPECIAL_TOKENS) <= i < tokenizer.vocab_size for i in ids)


def test_random_code_points_come_back(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    for _ in range(200):
        points = (rng.randrange(0x110000) for _ in range(rng.randrange(20)))
        text = "".join(chr(p) for p in points if not 0xD800 <= p < 0xE000)
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("mark", SPECIAL_TOKENS)
def test_marks_in_a_text_are_text(tokenizer: Tokenizer, mark: str) -> None:
    for copy in (tokenizer, pickle.loads(pickle.dumps(tokenizer)), Tokenizer(tokenizer.json)):
        ids = copy.encode(f"see {mark} here")
        assert min(ids) >= len(SPECIAL_TOKENS)
        assert copy.decode(ids) == f"see {mark} here"


def test_marks_have_the_ids_0_to_8_and_are_left_out_when_decoding(tokenizer: Tokenizer) -> None:
    assert tuple(tokenizer.token(i) for i in range(len(SPECIAL_TOKENS))) == SPECIAL_TOKENS
    assert tokenizer.decode([1, 4, *tokenizer.encode("seven"), 2, 0, 0]) == "seven"


def test_half_surrogates_and_cut_bytes_are_replaced(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud83d b")) == "a\ufffd b"
    assert tokenizer.decode(tokenizer.encode("🐸")[:-1]).startswith("\ufffd")


def test_training_is_deterministic_and_learns_merges(tokenizer: Tokenizer) -> None:
    again = train_tokenizer(iter(CORPUS), CONFIG)
    assert again.json == tokenizer.json
    assert again.digest == tokenizer.digest
    assert len(tokenizer.encode("Which number is it?")) < len("Which number is it?") / 2
    assert train_tokenizer(CORPUS[:3], CONFIG).digest != tokenizer.digest


def test_training_reads_no_more_than_it_may() -> None:
    texts = ["Which number is it?"] * 5 + ["zzzz"] * 50
    short = train_tokenizer(texts, TokenizerConfig(vocab_size=400, max_bytes=96))
    assert len(short.encode("zzzz")) == 4
    assert len(train_tokenizer(texts, CONFIG).encode("zzzz")) < 4


def test_save_and_load(tokenizer: Tokenizer, tmp_path) -> None:
    tokenizer.save(tmp_path)
    assert Tokenizer.load(tmp_path).digest == tokenizer.digest
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)
    with pytest.raises(ArtifactError, match=r"has no tokenizer\.json"):
        Tokenizer.load(tmp_path / "gone")


def test_a_given_tokenizer_keeps_our_marks_free(tmp_path) -> None:
    other = HFTokenizer(models.BPE())
    other.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    other.train_from_iterator(CORPUS, trainer)
    other.decoder = train_tokenizer(CORPUS, CONFIG)._inner.decoder
    other.save(str(tmp_path / "tokenizer.json"))
    given = given_tokenizer(str(tmp_path / "tokenizer.json"))
    ids = given.encode("这是 <|end|> <image>?")
    assert min(ids) >= len(SPECIAL_TOKENS)
    assert max(ids) < given.vocab_size == other.get_vocab_size() + len(SPECIAL_TOKENS)
    assert given.decode([1, *ids, 2]) == "这是 <|end|> <image>?"


def test_bad_settings_are_named(tmp_path) -> None:
    with pytest.raises(ConfigError, match="at least 265"):
        train_tokenizer(CORPUS, TokenizerConfig(vocab_size=100))
    with pytest.raises(ConfigError, match=r"gone\.json"):
        given_tokenizer(str(tmp_path / "gone.json"))
