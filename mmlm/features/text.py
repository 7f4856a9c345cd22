"""Text ↔ tokens: a byte-level BPE tokenizer (Hugging Face `tokenizers`) that never mistakes text for a mark.

Ids 0-8 are the marks of `features.spec`. They exist only as ids: a text that contains "<image>" is encoded as those
seven characters. Any text comes back exactly, whatever its language.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from mmlm.errors import ArtifactError, ConfigError
from mmlm.features.config import TokenizerConfig
from mmlm.features.spec import SPECIAL_TOKENS
from mmlm.storage import sha256_bytes, write_bytes

FILE = "tokenizer.json"
MIN_VOCABULARY = len(SPECIAL_TOKENS) + 256
BATCH = 1000
REMEMBERED = 65_536
"""Pieces of text whose ids are remembered, each of at most LONGEST_PIECE characters; about 20 MB."""
LONGEST_PIECE = 32

_PIECES = re.compile(r" ?\S+|\s+(?!\S)|\s+")
"""Cuts a text only where the byte-level splitter of GPT-2 cuts too: it never joins what stands before a space that a
word follows, nor what stands on both sides of other white space."""
_OTHER_SPACE = re.compile("[\x1c-\x1f]")
"""White space for Python, and not for the splitter."""
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}


class Tokenizer:
    """`given` is the text of a `tokenizer.json`: one that `train_tokenizer` made, or any other of Hugging Face's.

    The ids of another one move up by nine, so that ours stay 0-8.
    """

    def __init__(self, given: str) -> None:
        self.json = given
        self._inner = HFTokenizer.from_str(given)
        self._inner.encode_special_tokens = True  # marks in a text are text
        self._inner.no_truncation()
        self._inner.no_padding()
        own = all(self._inner.token_to_id(token) == i for i, token in enumerate(SPECIAL_TOKENS))
        self._shift = 0 if own else len(SPECIAL_TOKENS)
        self._pieces = _Pieces(self._whole_text) if _cuts_alike(json.loads(given)) else None

    def __reduce__(self) -> tuple[object, ...]:  # the inner one would forget that marks are text
        return (Tokenizer, (self.json,))

    @functools.cached_property
    def digest(self) -> str:
        return sha256_bytes(self.json.encode())

    @functools.cached_property
    def vocab_size(self) -> int:
        """Number of ids, the nine marks included."""
        return self._shift + max(self._inner.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def moved(self) -> int:
        """By how much the ids of a given tokenizer are moved up; 0 where it has our marks in their places."""
        return self._shift

    def encode(self, text: str) -> list[int]:
        """Ids ≥ 9 only. Halves of surrogate pairs, which are no text, become U+FFFD."""
        text = _whole(text)
        if self._pieces is None or _OTHER_SPACE.search(text):
            return self._whole_text(text)
        return list(chain.from_iterable(map(self._pieces.__getitem__, _PIECES.findall(text))))

    def _whole_text(self, text: str) -> list[int]:
        ids: list[int] = self._inner.encode(text, add_special_tokens=False).ids
        return [i + self._shift for i in ids] if self._shift else ids

    def encode_marks(self, text: str) -> list[int]:
        """Ids of a text that we trust, such as a chat template: a given tokenizer's own marks in it are marks. Ours
        are not, they belong to what a sequence is made of."""
        if not self._shift:
            return self.encode(text)
        self._inner.encode_special_tokens = False
        try:
            return self._whole_text(_whole(text))
        finally:
            self._inner.encode_special_tokens = True

    @functools.cached_property
    def unknown(self) -> int | None:
        """The id that stands for what a given tokenizer has no token for; None where bytes leave nothing unknown."""
        name = (json.loads(self.json).get("model") or {}).get("unk_token")
        found = self._inner.token_to_id(name) if name else None
        return None if found is None else found + self._shift

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, marks left out; bytes that are no UTF-8 become U+FFFD."""
        kept = [int(i) - self._shift for i in ids if int(i) >= len(SPECIAL_TOKENS)]
        text: str = self._inner.decode(kept, skip_special_tokens=False)
        return text

    def token(self, index: int) -> str:
        """The name of one id, for people to look at."""
        if index < len(SPECIAL_TOKENS):
            return SPECIAL_TOKENS[index]
        return self._inner.id_to_token(index - self._shift) or ""

    def save(self, folder: Path) -> None:
        write_bytes(folder / FILE, self.json.encode())

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """The tokenizer of a shard set or checkpoint. Raises ArtifactError when it is missing or broken."""
        try:
            return cls((folder / FILE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ArtifactError(
                f"{folder} has no {FILE}", wanted="a shard set or a checkpoint", cure="check the path"
            ) from None
        except Exception as error:  # the Rust side raises a plain Exception
            raise ArtifactError(f"{folder / FILE} cannot be read ({error})", cure="make the noun again") from None


class _Pieces(dict[str, list[int]]):
    """Piece of text → ids. Words come again and again: looking them up takes a fifth of the time of encoding them."""

    def __init__(self, encode: Any) -> None:
        self.encode = encode

    def __missing__(self, piece: str) -> list[int]:
        ids: list[int] = self.encode(piece)
        if len(piece) <= LONGEST_PIECE:
            if len(self) >= REMEMBERED:
                self.clear()
            self[piece] = ids
        return ids


def _cuts_alike(given: dict[str, Any]) -> bool:
    """Whether a tokenizer encodes the pieces of a text one by one as it would encode all of it."""
    splitter, model = given.get("pre_tokenizer") or {}, given.get("model") or {}
    return (
        {key: splitter.get(key) for key in _BYTE_LEVEL} == _BYTE_LEVEL
        and not given.get("normalizer")
        and model.get("type") == "BPE"
        and not model.get("dropout")
        and not model.get("continuing_subword_prefix")
        and not model.get("end_of_word_suffix")
        and all(token["special"] for token in given.get("added_tokens") or [])
    )


def _whole(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def given_tokenizer(path: str) -> Tokenizer:
    """The tokenizer in a file that the config names. Raises ConfigError."""
    try:
        return Tokenizer(Path(path).read_text(encoding="utf-8"))
    except Exception as error:  # missing, no text, or refused by the Rust side with a plain Exception
        raise ConfigError(
            f"features.tokenizer.file: {path} cannot be used ({error})",
            wanted="a Hugging Face tokenizer.json",
            cure="check the path, or leave it out to train one",
        ) from None


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    """A byte-level BPE tokenizer trained on the first `max_bytes` of `texts`; the same texts give the same bytes."""
    if config.vocab_size < MIN_VOCABULARY:
        raise ConfigError(
            f"features.tokenizer.vocab_size = {config.vocab_size}",
            wanted=f"at least {MIN_VOCABULARY}: 256 bytes and 9 marks",
        )
    inner = HFTokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(_batches(texts, config.max_bytes), trainer)
    return Tokenizer(inner.to_str())


def text_bytes(text: str) -> int:
    return len(text.encode(errors="replace"))


def _batches(texts: Iterable[str], max_bytes: int) -> Iterator[list[str]]:
    batch: list[str] = []
    seen = 0
    for text in texts:
        seen += text_bytes(text)
        if seen > max_bytes:
            break
        batch.append(_whole(text))
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
