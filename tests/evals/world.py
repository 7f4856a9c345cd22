"""A tiny real world for the tests of evals: samples with pictures and sounds, and a short model that answers them."""

from __future__ import annotations

import numpy as np

from mmlm.evals.bench import Bench, Samples
from mmlm.features.sample import Sample
from mmlm.features.spec import ANSWER, AUDIO, BOS, EOS, IMAGE, AudioSpec, FeatureSpec, ImageSpec, TaskSpec

LABELS = ["0", "1", "2", "3"]
WORDS = {"en": ["zero", "one", "two", "three"], "zh": ["零", "一", "二", "三"]}


class Characters:
    """Tokens are code points, moved up by the nine marks."""

    def encode(self, text: str) -> list[int]:
        return [ord(c) + 9 for c in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(i - 9) for i in ids if i >= 9)


class Guesser:
    """Right with probability `skill` per modality that is given; answers in the record's language."""

    def __init__(self, skill: float, seed: int = 0) -> None:
        self.skill, self.seed = skill, seed

    def answer(self, samples, *, batch_size=64, given=None, generation=None):  # type: ignore[no-untyped-def]
        from mmlm.evals.answer import Answer

        found = []
        for s in samples:
            rng = np.random.default_rng([self.seed, int(s.id[1:])])
            kept = [m for m in s.modalities if given is None or m in given]
            right = rng.random() > (1 - self.skill) ** len(kept)
            label = s.label if right and s.label in LABELS else LABELS[rng.integers(len(LABELS))]
            sure = float(rng.uniform(0.6, 0.99))
            rest = (1 - sure) / (len(LABELS) - 1)
            scores = {k: sure if k == label else rest for k in LABELS}
            found.append(Answer(WORDS[s.lang][LABELS.index(label)], sure, label, scores))
        return found


def make_samples(n: int, split: str, *, groups: int | None = None, offset: int = 0, side: int = 16) -> list[Sample]:
    """Pictures with one bright row and sounds with one loud bin, at the place that the label says."""
    rng, found, words = np.random.default_rng(offset + n), [], Characters()
    for i in range(n):
        number, lang = int(rng.integers(len(LABELS))), ("en", "zh")[i % 2]
        picture = rng.integers(0, 120, (side, side, 1)).astype(np.uint8)
        picture[number * side // 4 : (number + 1) * side // 4] //= 2
        mel = rng.normal(-3, 1, (12, 8)).astype(np.float16)
        mel[:, number] += 1
        question = words.encode(("Which?", "这是几？")[i % 2])
        tokens = [BOS, IMAGE, AUDIO, *question, ANSWER]
        answer = WORDS[lang][number]
        group = f"g{i % groups}" if groups else f"g{i}"
        row = np.array([*tokens, *words.encode(answer), EOS], dtype=np.int32)
        found.append(
            Sample(
                f"r{offset + i}",
                "digit",
                row,
                len(tokens) - 1,
                [picture],
                [mel],
                lang=lang,
                split=split,
                group=group,
                label=LABELS[number],
                answer=answer,
            )
        )
    return found


def make_spec() -> FeatureSpec:
    return FeatureSpec(
        vocab_size=70000, tokenizer_digest="0" * 64, max_len=64,
        image=ImageSpec(size=16, patch=4, channels=1), audio=AudioSpec(n_mels=8),
        tasks=[TaskSpec(name="digit", labels=LABELS, has_text=True, langs=["en", "zh"])],
    )  # fmt: skip


def make_bench(test: list[Sample], train: list[Sample], val: list[Sample]) -> Bench:
    splits: dict[str, Samples] = {"test": test, "train": train, "val": val}
    models = {"teacher": Guesser(0.8), "student": Guesser(0.7, 1)}
    return Bench(lambda split: splits[split], models, make_spec(), Characters())
