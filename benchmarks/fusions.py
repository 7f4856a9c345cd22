"""AV-Digits: every fusion against models of one modality alone, and against itself with an input taken away.

    python -m benchmarks.fusions --json FILE [--out DIR] [--seeds 5] [--minutes M]

Pictures are scikit-learn's 1,797 handwritten digits with Gaussian noise of standard deviation 8 on their scale of 0 to 16;
sounds are the telephone's key tones in so much noise that they alone give about 70 %. A fifth of the digits is the test
part, a fifth of the others the validation part (`--validation` scores that one instead: for choosing settings). All models
have the same recipe: 5 fusions, and `concat` trained on pictures alone and on sounds alone. One result file a model and
seed, which is not trained again: a run that was stopped goes on, and `--minutes` stops it in good time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness.command import write
from benchmarks.ours.av_digits import Recipe, data_of, linear, trained

LINEAR = "linear"
"""Logistic regressions on the same samples, for reference."""
FUSIONS = ("concat", "add", "cross_attention", "adversarial", "late")
ALONE = ("image", "audio")
GIVEN = {"both": ALONE, "image": ("image",), "audio": ("audio",)}
T4 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Seeds → 0.975 quantile of Student's t."""


def jobs(seeds: int) -> Iterator[tuple[str, int]]:
    for seed in range(seeds):
        yield LINEAR, seed
        for name in (*(f"only-{m}" for m in ALONE), *FUSIONS):
            yield name, seed


def run(name: str, seed: int, recipe: Recipe, part: str) -> dict[str, Any]:
    """Train one model and score it with each of its inputs."""
    alone = name.removeprefix("only-") if name.startswith("only-") else None
    start = time.process_time()
    data = data_of(seed, recipe)
    if name == LINEAR:
        return {
            "model": name, "seed": seed, "part": part, "n": len(data[part]), "accuracy": linear(data, part),
            "cpu_seconds": time.process_time() - start, "recipe": recipe._asdict(),
        }  # fmt: skip
    model = trained("concat" if alone else name, alone, data["train"], recipe, seed)
    given = [alone] if alone else list(GIVEN)
    right = {g: model.right(data[part], GIVEN[g]) for g in given}
    return {
        "model": name, "seed": seed, "part": part, "parameters": model.parameters, "n": len(data[part]),
        "accuracy": {g: float(np.mean(r)) for g, r in right.items()}, "cpu_seconds": time.process_time() - start,
        "recipe": recipe._asdict(),
    }  # fmt: skip


def interval(values: list[float]) -> tuple[float, float, float]:
    """Mean over seeds, and its 95 % interval by Student's t."""
    mean = statistics.mean(values)
    half = T4[len(values)] * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return mean, mean - half, mean + half


def rows(found: dict[tuple[str, int], dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each model and what it is given: beside it the best model of one modality alone (both given), or the one
    that was trained on what is given; `difference` is paired by seed."""
    seeds = sorted({seed for _, seed in found})

    def accuracy(name: str, given: str) -> list[float]:
        return [found[name, seed]["accuracy"][given] for seed in seeds]

    made = []
    for name in (*(f"only-{m}" for m in ALONE), *FUSIONS):
        for given in found[name, seeds[0]]["accuracy"]:
            best = max(ALONE, key=lambda m: statistics.mean(accuracy(f"only-{m}", m))) if given == "both" else given
            ours, theirs = accuracy(name, given), accuracy(f"only-{best}", best)
            mean, low, high = interval(ours)
            apart = interval([a - b for a, b in zip(ours, theirs, strict=True)])
            made.append(
                {
                    "name": f"{name}, {given}", "unit": "accuracy", "ours": round(mean, 4),
                    "peer": round(statistics.mean(theirs), 4), "peer_name": f"{best} alone",
                    "ratio": round(mean / statistics.mean(theirs), 3), "goal": None, "runs": len(seeds),
                    "low": round(low, 4), "high": round(high, 4), "difference": [round(x, 4) for x in apart],
                    "parameters": found[name, seeds[0]]["parameters"], "n": found[name, seeds[0]]["n"],
                }
            )  # fmt: skip
    return made


def reference(found: dict[tuple[str, int], dict[str, Any]]) -> str:
    """The linear models, as a sentence."""
    kinds: dict[str, list[float]] = {}
    for (name, _), result in sorted(found.items()):
        for kind, accuracy in result["accuracy"].items() if name == LINEAR else ():
            kinds.setdefault(kind, []).append(accuracy)
    shown = (
        f"{kind} {mean:.3f} [{low:.3f}, {high:.3f}]" for kind, v in kinds.items() for mean, low, high in [interval(v)]
    )
    return f"Logistic regression: {', '.join(shown)}."


def table(made: list[dict[str, Any]]) -> str:
    """Markdown, as it stands in docs/results.md."""
    cells = {tuple(row["name"].split(", ")): row for row in made}
    lines = ["| accuracy, mean of seeds [95 %] | both | picture | sound | parameters |", "|---|---|---|---|---|"]
    for name in dict.fromkeys(model for model, _ in cells):
        shown = []
        for given in GIVEN:
            row = cells.get((name, given))
            apart = ""
            if row and given != "both" and not name.startswith("only-"):
                apart = " ({:+.3f} [{:+.3f}, {:+.3f}])".format(*row["difference"])
            shown.append(f"{row['ours']:.3f} [{row['low']:.3f}, {row['high']:.3f}]{apart}" if row else "")
        size = next(row["parameters"] for (model, _), row in cells.items() if model == name)
        lines.append(f"| `{name}` | {' | '.join(shown)} | {size:,} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fusions", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--out", type=Path, default=Path("runs/fusions"), help="folder of the results (runs/fusions)")
    parser.add_argument("--seeds", type=int, default=5, help="from 0 (5); the rows need two or more")
    parser.add_argument("--minutes", type=float, default=60.0, help="begin no training after so many (60)")
    parser.add_argument("--only", action="append", help="one model; may be given several times")
    parser.add_argument("--validation", action="store_true", help="score the validation part")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a number of the recipe")
    asked = parser.parse_args()
    changed = dict(pair.split("=") for pair in asked.set)
    recipe = Recipe(**{k: type(getattr(Recipe(), k))(v) for k, v in changed.items()})
    part = "val" if asked.validation else "test"
    torch.set_num_threads(1)
    asked.out.mkdir(parents=True, exist_ok=True)
    end, found = time.monotonic() + 60 * asked.minutes, {}
    for name, seed in jobs(asked.seeds):
        if asked.only and name not in asked.only:
            continue
        path = asked.out / f"{name}-{seed}-{part}.json"
        if not path.exists() or json.loads(path.read_text())["recipe"] != recipe._asdict():
            if time.monotonic() > end:
                print("the time is over; the same command again goes on", file=sys.stderr)
                return 0
            path.write_text(json.dumps(run(name, seed, recipe, part)))
        found[name, seed] = result = json.loads(path.read_text())
        shown = ", ".join(f"{given} {value:.3f}" for given, value in result["accuracy"].items())
        print(f"{name:16s} seed {seed}: {shown}  ({result['cpu_seconds']:.0f} s)", file=sys.stderr, flush=True)
    if not asked.only and asked.seeds > 1:
        made = rows(found)
        write(made, asked.json)
        print(table(made))
        print(reference(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
