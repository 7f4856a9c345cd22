"""The data and the training of AV-Digits: samples in memory, our model and objective, a loop of a dozen lines.

All that is random about the data follows from the seed, but for which digits are test and validation: that never changes.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import torch

from mmlm.config import parse
from mmlm.corpus.keypad import DTMF
from mmlm.data.collate import collate
from mmlm.data.modalities import drop_modalities, keep_modalities
from mmlm.features.audio import log_mel
from mmlm.features.sample import Sample
from mmlm.features.spec import ANSWER, AUDIO, BOS, EOS, IMAGE, AudioSpec, FeatureSpec, ImageSpec, TaskSpec
from mmlm.model.config import ModelConfig
from mmlm.model.transformer import FusedTransformer, count_parameters
from mmlm.train.config import CosineConfig, LossConfig
from mmlm.train.objectives import Answering, loss_of
from mmlm.train.schedule import learning_rate

QUESTION, FIRST = 9, 10
"""Token of the question, and of the digit 0."""
SPEC = FeatureSpec(
    vocab_size=32,
    tokenizer_digest="none",
    max_len=32,
    image=ImageSpec(size=8, patch=4, channels=1),
    audio=AudioSpec(sample_rate=8000, n_fft=256, hop=160, n_mels=40, max_seconds=0.25, frames_per_token=3),
    tasks=[TaskSpec(name="digit", labels=[str(n) for n in range(10)], has_text=True)],
)


class Recipe(NamedTuple):
    """Shared by all models."""

    width: int = 64
    layers: int = 2
    steps: int = 500
    batch: int = 128
    lr: float = 3e-3
    decay: float = 0.1
    dropout: float = 0.1
    modality_dropout: float = 0.7
    renderings: int = 8
    """Of each training digit, each with noise of its own."""
    picture_noise: float = 8.0
    """Standard deviation, where the ink is 0 to 16."""
    sound_noise: float = 5.7
    """Standard deviation, in root mean squares of the tone; in training anything up to it: sounds that are all as noisy as
    those of the test are not learnt at all (.09 after 300 steps; .53 when some are clearer)."""


@functools.lru_cache(maxsize=1)
def data_of(seed: int, recipe: Recipe) -> dict[str, list[Sample]]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(2026).permutation(len(digits.target))
    fifth = len(order) // 5
    parts = {"test": order[:fifth], "val": order[fifth : 2 * fifth], "train": order[2 * fifth :]}
    data = {}
    for number, (part, chosen) in enumerate(parts.items()):
        rng = np.random.default_rng((seed, number))
        times = recipe.renderings if part == "train" else 2
        data[part] = [
            rendered(f"{part}-{n}-{r}", digits.images[n], int(digits.target[n]), rng, recipe)
            for n in chosen
            for r in range(times)
        ]
    return data


def rendered(name: str, picture: np.ndarray, digit: int, rng: np.random.Generator, recipe: Recipe) -> Sample:
    noisy = picture + recipe.picture_noise * rng.standard_normal(picture.shape)
    pixels = np.clip(np.round((noisy + 32) * 255 / 80), 0, 255).astype(np.uint8)  # -32 to 48 ink: 4 deviations
    spec = SPEC.audio
    assert spec is not None
    t = np.arange(int(spec.sample_rate * spec.max_seconds)) / spec.sample_rate
    low, high = DTMF[str(digit)]
    phases = rng.uniform(0, 2 * np.pi, 2)
    tone = np.sin(2 * np.pi * low * t + phases[0]) + np.sin(2 * np.pi * high * t + phases[1])
    loudness = recipe.sound_noise * (rng.uniform() if name.startswith("train") else 1.0)
    sound = log_mel((tone + loudness * rng.standard_normal(len(t))).astype(np.float32), spec)
    tokens = np.array([BOS, IMAGE, AUDIO, QUESTION, ANSWER, FIRST + digit, EOS], np.int32)
    return Sample(name, "digit", tokens, 4, [pixels[..., None]], [sound], label=str(digit))


STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Of a linear model's regularization (sklearn's C); the validation part chooses."""


def linear(data: dict[str, list[Sample]], part: str) -> dict[str, float]:
    """Accuracies of multinomial logistic regressions on pixels, on the mean log-mel row of a sound, and on both: side by side
    (`concat`), and as the product of the two that know one modality (`product`)."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    seen = {
        name: {
            "image": np.stack([s.images[0].ravel() / 255 for s in samples]),
            "audio": np.stack([s.sounds[0].astype(np.float32).mean(0) for s in samples]),
        }
        for name, samples in data.items()
    }  # fmt: skip
    for views in seen.values():
        views["concat"] = np.concatenate([views["image"], views["audio"]], 1)
    digits = {name: np.array([int(s.label or "") for s in samples]) for name, samples in data.items()}
    chance, right = {}, {}
    for view in ("image", "audio", "concat"):
        fitted = [
            make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=500)).fit(
                seen["train"][view], digits["train"]
            )
            for c in STRENGTHS
        ]
        best = max(fitted, key=lambda model: model.score(seen["val"][view], digits["val"]))
        chance[view] = best.predict_log_proba(seen[part][view])
        right[view] = float(np.mean(chance[view].argmax(1) == digits[part]))
    product = chance["image"] + chance["audio"]  # of ten digits that are equally many
    return {**right, "product": float(np.mean(product.argmax(1) == digits[part]))}


class Trained:
    def __init__(self, model: FusedTransformer) -> None:
        self.model, self.parameters = model.eval(), count_parameters(model)

    @torch.no_grad()
    def right(self, samples: list[Sample], given: tuple[str, ...]) -> np.ndarray:
        """(N,) bool: whether the most likely class is the true one."""
        found = []
        for first in range(0, len(samples), 256):
            batch = collate([keep_modalities(s, set(given)) for s in samples[first : first + 256]], SPEC)
            found.append((self.model(batch).label_RC.argmax(-1) == batch.label_R).numpy())
        return np.concatenate(found)


def trained(fusion: str, alone: str | None, samples: list[Sample], recipe: Recipe, seed: int) -> Trained:
    """A model with this fusion; of one modality where `alone` names it."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"width": recipe.width, "layers": recipe.layers, "heads": 4, "dropout": recipe.dropout}
    config = parse(ModelConfig, {**sizes, "attention": "prefix", "fusion": fusion}, "the recipe")
    model = FusedTransformer(config, SPEC).train()
    matrices = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": recipe.decay}, {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    objective, rng = Answering(LossConfig(), SPEC, config), np.random.default_rng((seed, 9))
    if alone:
        samples = [keep_modalities(s, {alone}) for s in samples]
    for step in range(recipe.steps):
        model.progress = step / recipe.steps
        chosen = rng.integers(len(samples), size=recipe.batch)
        batch = collate([drop_modalities(samples[i], recipe.modality_dropout, rng) for i in chosen], SPEC)
        loss = loss_of(objective(model, batch), objective.counts(batch))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe.steps, recipe.lr, CosineConfig())
        optimizer.step()
    return Trained(model)
