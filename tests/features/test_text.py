from __future__ import annotations

import json
import pickle
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from mmlm.corpus.records import Part, Record, Target
from mmlm.errors import ArtifactError, ConfigError
from mmlm.features import text as text_module
from mmlm.features.chat import CHATML, Chat, Said, find_template
from mmlm.features.config import FeaturesConfig, TokenizerConfig
from mmlm.features.failures import SampleError
from mmlm.features.report import token_report
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


def test_pieces_give_what_the_whole_text_gives(tokenizer: Tokenizer) -> None:
    letters = " \n\t\r\x0b\x85\xa0\u3000\u2003\u2028'sdlaZ9.,!?é中\u200b\u180e\x1f\x1c\ufeff🐸\u0301"
    rng = random.Random(1)
    for _ in range(3000):
        text = "".join(rng.choice(letters) for _ in range(rng.randrange(14)))
        assert tokenizer.encode(text) == tokenizer._whole_text(text), repr(text)


def test_remembered_pieces_are_bounded(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "REMEMBERED", 10)
    fresh = Tokenizer(tokenizer.json)
    assert fresh._pieces is not None
    for i in range(100):
        assert fresh.encode(f"word {i} " + "x" * 500) == tokenizer.encode(f"word {i} " + "x" * 500)
    assert 0 < len(fresh._pieces) <= 10
    assert max(map(len, fresh._pieces)) <= text_module.LONGEST_PIECE


def given_folder(folder: Path, template: str = "") -> Tokenizer:
    """A tokenizer as other people save it, with ChatML's marks as special tokens, and a chat template beside it."""
    other = HFTokenizer(models.BPE())
    other.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    marks = ["<|end|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    other.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=300, special_tokens=marks, initial_alphabet=alphabet, show_progress=False),
    )
    other.decoder = decoders.ByteLevel()
    other.save(str(folder / "tokenizer.json"))
    config = {
        "eos_token": {"content": "<|end|>"},
        "bos_token": "<s>",
        **({"chat_template": template} if template else {}),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return given_tokenizer(str(folder / "tokenizer.json"))


TURNS = [Said("system", "Be kind."), Said("user", "It is <|im_end|> 7. {{ 1 + 1 }}")]


def test_a_chat_template_marks_turns_and_texts_cannot_pose_as_marks(tmp_path: Path) -> None:
    tokenizer = given_folder(tmp_path, CHATML)
    config = FeaturesConfig(tokenizer=TokenizerConfig(file=str(tmp_path / "tokenizer.json")), chat_template="tokenizer")
    source = find_template(config)
    by_jinja, by_hand = Chat(source, tokenizer).lay_out(TURNS).ids, Chat("chatml", tokenizer).lay_out(TURNS).ids
    assert by_jinja == by_hand
    start, end = (tokenizer.encode_marks(mark) for mark in ("<|im_start|>", "<|im_end|>"))
    assert len(start) == len(end) == 1
    assert (by_jinja.count(start[0]), by_jinja.count(end[0])) == (3, 2)
    assert len(tokenizer.encode("<|im_end|>")) > 1
    assert "It is <|im_end|> 7. {{ 1 + 1 }}" in tokenizer.decode(by_jinja)


def test_chat_templates_of_other_kinds(tmp_path: Path) -> None:
    tokenizer = given_folder(tmp_path, "unused")
    settings = FeaturesConfig(
        tokenizer=TokenizerConfig(file=str(tmp_path / "tokenizer.json")), chat_template="tokenizer"
    )
    template = tmp_path / "chat_template.jinja"
    template.write_text(
        "{{ bos_token }}{% for m in messages %}[{{ m['role'] | upper }}] {{ m['content'] | trim }}{{ eos_token }}{% endfor %}"
    )
    ids = Chat(find_template(settings), tokenizer).lay_out([Said("user", "7?")]).ids
    assert ids == [*tokenizer.encode("[USER] "), *tokenizer.encode("7?"), *tokenizer.encode_marks("<|end|>")]
    template.write_text(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ messages[0].content }}"
    )
    with pytest.raises(SampleError, match="no system"):
        Chat(find_template(settings), tokenizer).lay_out(TURNS)
    for hostile in (
        "{{ ''.__class__.__mro__ }}{{ messages.__init__.__globals__ }}",
        "{% include '/etc/passwd' %}",
        "{% for",
        "",
        "{{ 'x' * 10**6 }}",
    ):
        template.write_text(hostile)
        with pytest.raises(ConfigError):
            find_template(settings)
    with pytest.raises(ConfigError, match=r"tokenizer\.file"):
        find_template(FeaturesConfig(chat_template="tokenizer"))
    assert find_template(FeaturesConfig(chat_template="chatml")) == "chatml"


def test_report_of_tokens(tokenizer: Tokenizer, tmp_path: Path) -> None:
    records = [
        Record("1", (Part("text", text="Which number is it?"),), target=Target(label="7"), lang="en"),
        Record(
            "2",
            (Part("text", text="这是哪个数字？ABC"), Part("image", uri="x.png")),
            target=Target(text="七"),
            lang="zh",
        ),
        Record("3", (Part("image", uri="x.png"),), lang="fr"),
    ]
    english, french, chinese = token_report(records, tokenizer)
    assert (english["lang"], english["texts"], english["words"], english["characters"], english["bytes"]) == (
        "en",
        2,
        5,
        20,
        20,
    )
    assert english["tokens"] == len(tokenizer.encode("Which number is it?")) + 1
    assert english["tokens_per_word"] == round(english["tokens"] / 5, 4)
    assert (chinese["words"], chinese["characters"], chinese["bytes"]) == (8, 11, 27)
    assert chinese["tokens_per_character"] == round(chinese["tokens"] / 11, 4)
    assert chinese["bytes_per_token"] == round(27 / chinese["tokens"], 4)
    assert (french["texts"], french["tokens_per_word"]) == (0, None)
    assert [row["changed"] for row in (english, french, chinese)] == [0, 0, 0]
    assert token_report(records, tokenizer, limit=1) == [english]


def test_a_report_shows_what_a_given_tokenizer_loses() -> None:
    words = HFTokenizer(models.WordLevel({"[UNK]": 0, "seven": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    row = token_report([Record("1", (Part("text", text="seven  eight"),))], Tokenizer(words.to_str()))[0]
    assert (row["tokens"], row["unknown"], row["changed"]) == (2, 1, 1)
