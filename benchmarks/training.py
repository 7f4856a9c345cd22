"""The step of training against Hugging Face transformers + accelerate, plain and with DeepSpeed: same sizes, same texts.

On a CPU: 10 M and 100 M parameters, one core, bf16. Rows count tokens that are predicted, padding never. With `--device cuda`:
350 M, 760 M and 1 B parameters at 2,048 and 8,192 positions, and the share of the GPU's peak that is reached (MFU).
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import inputs
from benchmarks.harness.command import told, write
from benchmarks.harness.measure import Contestant, Log, Standing, contest, machine, row

OURS = "mmlm"


@dataclass(frozen=True)
class Size:
    """A model and how it is run: `batch` texts a step, `steps` of them timed after `warm` others.

    On a CPU both are an epoch, so that everybody's clock runs over the same texts and as many updates, whatever the order.
    """

    name: str
    width: int
    layers: int
    heads: int
    batch: int
    steps: int
    warm: int = 1

    @property
    def mlp_width(self) -> int:
        return -(-self.width * 8 // 3 // 32) * 32

    def options(self, device: str) -> dict[str, Any]:
        model = {"width": self.width, "layers": self.layers, "heads": self.heads, "mlp_width": self.mlp_width}
        model |= {"kv_heads": self.heads, "qk_norm": False}  # as the peers'
        return {
            "model": model, "batch": self.batch, "steps": self.steps, "warm": self.warm, "threads": 1, "device": device,
        }  # fmt: skip


ON_CPU = (
    Size("10 M", width=256, layers=4, heads=4, batch=16, steps=4, warm=4),
    Size("100 M", width=768, layers=12, heads=12, batch=8, steps=4, warm=4),
)
VOCABULARY = 400
"""Texts that the tokenizer is trained on."""


def on_cpu(size: Size, runs: int, log: Log) -> list[dict[str, Any]]:
    """Every contestant trains the same model on the same texts, `runs` times, one after the other in turn."""
    options = size.options("cpu")
    plain = Contestant("transformers + accelerate", "hf_training", options, "transformers")
    deep = Contestant(
        "transformers + accelerate + DeepSpeed", "hf_training", {**options, "deepspeed": True}, "transformers"
    )
    low = Contestant("the same without float32 weights", "hf_training", {**options, "weights": "bf16"}, "transformers")
    contestants = [Contestant(OURS, "training", options), plain, deep, low]
    texts = inputs.first_texts(size.batch * size.steps, VOCABULARY)
    found = contest(contestants, texts, inputs.texts(64), runs, log)
    mine, unit = found[OURS], "tokens/s a core"
    told = {name: _first(standing, "parameters", "losses") for name, standing in found.items()}
    rows = [row(size.name, unit, mine, [found[plain.name], found[deep.name]], clock="cpu", goal=1.3, told=told)]
    rows += [row(f"{size.name}: {p.name}", unit, mine, [found[p.name]], clock="cpu") for p in (plain, deep, low)]
    outside = statistics.median(run.result["outside"] for run in mine.runs)
    rows.append(
        {
            "name": f"{size.name}: share of a step outside forward, backward and optimizer", "unit": "share",
            "ours": round(outside, 4), "peer": 0.03, "peer_name": "what was asked for",
            "ratio": round(0.03 / max(outside, 1e-6), 2), "goal": 1.0, "runs": len(mine.runs),
        }
    )  # fmt: skip
    return rows


def _first(standing: Standing, *keys: str) -> dict[str, Any]:
    return {key: standing.runs[0].result[key] for key in keys} if standing.runs else {"reason": standing.reason}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", action="append", choices=[s.name for s in ON_CPU], help="one size of the CPU")
    parser.add_argument("--runs", type=int, default=3, help="rounds of which the median counts (3)")
    asked = parser.parse_args()
    log, rows = Log("training"), []
    log.note("machine", **machine())
    if asked.device == "cuda":
        from benchmarks.ours.mfu import on_gpu

        rows = on_gpu(asked.runs, log)
    else:
        for size in ON_CPU:
            if not asked.only or size.name in asked.only:
                rows += on_cpu(size, asked.runs, log)
    for made in rows:
        print(told(made), flush=True)
    write(rows, asked.json)
    log.note("machine", **machine())
    return 0


if __name__ == "__main__":
    sys.exit(main())
