"""Print which model learns most from few pictures: a table of docs/results.md, made from scikit-learn's digits.

python docs/make_small_data.py          # about 15 minutes of one core
"""

from __future__ import annotations

import time

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from mmlm.data.collate import collate
from mmlm.features.sample import Sample
from mmlm.features.spec import ANSWER, BOS, IMAGE, FeatureSpec, ImageSpec, TaskSpec
from mmlm.model.baseline_config import AnyModelConfig, CnnConfig
from mmlm.model.config import ModelConfig
from mmlm.train import weights
from mmlm.train.config import LossConfig
from mmlm.train.objectives import Answering, loss_of

STEPS, BATCH, RATE, HELD_OUT = 250, 64, 2e-3, 500
PIXELS, LABELS = load_digits(return_X_y=True)
SPEC = FeatureSpec(
    vocab_size=9, tokenizer_digest="none", max_len=32, image=ImageSpec(size=16, patch=4, channels=1),
    tasks=[TaskSpec(name="digit", labels=[str(n) for n in range(10)])],
)  # fmt: skip
MODELS: dict[str, AnyModelConfig] = {
    "cnn": CnnConfig(channels=(16, 32, 64), width=64, dropout=0.2),
    "transformer": ModelConfig(width=64, layers=2, heads=4, attention="prefix", dropout=0.1),
}


def record(number: int, down: int = 0, right: int = 0) -> Sample:
    """A digit of 16 x 16 pixels, moved."""
    picture = np.kron((PIXELS[number] * 255 / 16).astype(np.uint8).reshape(8, 8), np.ones((2, 2), np.uint8))
    picture = np.roll(picture, (down, right), (0, 1))[..., None]
    tokens = np.array([BOS, IMAGE, ANSWER], np.int32)
    return Sample(str(number), "digit", tokens, 2, [picture], label=str(LABELS[number]))


def accuracy(config: AnyModelConfig, train: np.ndarray, test: np.ndarray, seed: int) -> float:
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    net, objective = weights.build(config, SPEC).train(), Answering(LossConfig(answer=0), SPEC)
    optimizer = torch.optim.AdamW(net.parameters(), RATE, weight_decay=0.05)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 20) * (1 + np.cos(np.pi * step / STEPS)) / 2
        batch = collate([record(n, *rng.integers(-1, 2, 2)) for n in rng.choice(train, BATCH)], SPEC)
        loss_of(objective(net, batch), objective.counts(batch)).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    batch = collate([record(n) for n in test], SPEC)
    with torch.no_grad():
        return float((net.eval()(batch).label_RC.argmax(-1) == batch.label_R).float().mean())


def main() -> None:
    for count in (100, 300, 1000):
        for seed in range(2):
            order = np.random.default_rng(seed).permutation(len(LABELS))
            test, train = order[:HELD_OUT], order[HELD_OUT : HELD_OUT + count]
            linear = LogisticRegression(max_iter=500).fit(PIXELS[train] / 16, LABELS[train])
            row = {"logistic": linear.score(PIXELS[test] / 16, LABELS[test])}
            start = time.process_time()
            row |= {name: accuracy(config, train, test, seed) for name, config in MODELS.items()}
            told = ", ".join(f"{name} {value:.3f}" for name, value in row.items())
            print(f"{count} records, seed {seed}: {told} ({time.process_time() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
