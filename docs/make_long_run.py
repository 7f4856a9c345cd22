"""Draw docs/long_run.png from a training's figures, and print what docs/results.md says of it.

python docs/make_long_run.py runs/almanac/model/metrics.jsonl
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

PICTURE = Path(__file__).with_name("long_run.png")


def main(path: str) -> None:
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    steps = [{"step": row["step"], **row["metrics"]} for row in rows if "cpu_seconds" in row["metrics"]]
    looks = [{"step": row["step"], **row["metrics"]} for row in rows if "val/loss" in row["metrics"]]
    every = steps[1]["step"] - steps[0]["step"]
    tokens = np.array([row["tokens_per_second"] * row["step_seconds"] * every for row in steps])
    cpu = np.array([row["cpu_seconds"] for row in steps])
    wall = np.array([row["step_seconds"] * every for row in steps])
    quarter = len(steps) // 4
    print(
        f"steps {steps[-1]['step']:,}, real tokens {tokens.sum():,.0f}, {wall.sum():,.0f} s, CPU seconds {cpu.sum():,.0f}"
    )
    for name, clock in (("second", wall), ("CPU second", cpu)):
        first, last = (tokens[part].sum() / clock[part].sum() for part in (slice(0, quarter), slice(-quarter, None)))
        print(f"tokens a {name}: first quarter {first:,.0f}, last {last:,.0f} ({last / first - 1:+.1%})")
    at = np.array([row["step"] for row in steps])
    own = np.array([row["memory_own_bytes"] for row in steps]) / 1e6
    for share in (0, 0.25, 0.5, 0.75):
        late = at > share * at[-1]
        slope = np.polyfit(at[late] / 1000, own[late], 1)[0]
        print(
            f"own memory from step {at[late][0]:,}: {slope:+.1f} MB per 1,000 steps, {own[late].mean():,.0f} MB on average"
        )
    print(f"outside forward, backward and optimizer: {np.mean([row['outside'] for row in steps]):.1%}")
    print(f"padding {1 - tokens.sum() / (tokens / (1 - np.array([r['padding'] for r in steps]))).sum():.1%}")
    for row in looks:
        print(
            f"step {row['step']:,}: validation loss {row['val/loss']:.3f}, label accuracy {row['val/label_accuracy']:.3f}"
        )
    draw(steps, looks, tokens / wall)


def draw(steps: list[dict[str, float]], looks: list[dict[str, float]], speed: np.ndarray) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    at = [row["step"] for row in steps]
    figure, (loss, rate, memory) = plt.subplots(3, 1, figsize=(7, 8), sharex=True, constrained_layout=True)
    loss.plot(at, [row["loss"] for row in steps], lw=0.7, label="training, 8 sequences a step")
    loss.plot([row["step"] for row in looks], [row["val/loss"] for row in looks], "o-", label="validation")
    loss.set_ylabel("loss, nats")
    loss.legend()
    rate.plot(at, speed, lw=0.7)
    rate.set_ylabel("real tokens a second")
    rate.set_ylim(bottom=0)
    memory.plot(at, [row["memory_own_bytes"] / 1e6 for row in steps], lw=0.9)
    memory.set_ylabel("own memory, MB")
    memory.set_ylim(bottom=0)
    memory.set_xlabel("step")
    figure.savefig(PICTURE, dpi=110)
    print(f"wrote {PICTURE}")


if __name__ == "__main__":
    main(sys.argv[1])
