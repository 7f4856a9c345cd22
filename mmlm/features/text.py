"""Text ↔ tokens: a byte-level BPE tokenizer (Hugging Face `tokenizers`) that never mistakes text for a mark.

Ids 0-8 are the marks of `features.spec`. They exist only as ids: a text that contains "<image>" is encoded as those
seven characters. Any text comes back exactly, whatever its language.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from mmlm.errors import ArtifactError, ConfigError
from mmlm.features.config import TokenizerConfig
from mmlm.features.spec import SPECIAL_TOKENS
from mmlm.storage import sha256_bytes, write_bytes

FILE = "tokenizer.json"
MIN_VOCABULARY = len(SPECIAL_TOKENS) + 256
BATCH = 1000


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

    def __reduce__(self) -> tuple[object, ...]:  # the inner one would forget that marks are text
        return (Tokenizer, (self.json,))

    @functools.cached_property
    def digest(self) -> str:
        return sha256_bytes(self.json.encode())

    @functools.cached_property
    def vocab_size(self) -> int:
        """Number of ids, the nine marks included."""
        return self._shift + max(self._inner.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        """Ids ≥ 9 only. Halves of surrogate pairs, which are no text, become U+FFFD."""
        ids: list[int] = self._inner.encode(_whole(text), add_special_tokens=False).ids
        return [i + self._shift for i in ids] if self._shift else ids

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


def _batches(texts: Iterable[str], max_bytes: int) -> Iterator[list[str]]:
    batch: list[str] = []
    seen = 0
    for text in texts:
        seen += len(text.encode(errors="replace"))
        if seen > max_bytes:
            break
        batch.append(_whole(text))
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
