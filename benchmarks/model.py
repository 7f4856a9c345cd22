"""The model's passes, generation and memory against Hugging Face transformers' Llama of the same shape, on the same texts.

On a CPU: 10 M and 100 M parameters in bf16 on one core. With `--device cuda`: 1 B parameters.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import inputs
from benchmarks.harness.command import told, write
from benchmarks.harness.measure import Contestant, Log, Standing, contest, machine, row

OURS = "mmlm"
LLAMA = "transformers LlamaForCausalLM"
DOCUMENTS = 400


@dataclass(frozen=True)
class Size:
    """A model; `batch` texts of `length` tokens make a pass, `steps` passes a run; `new` tokens an answer, `times` times."""

    name: str
    width: int
    layers: int
    heads: int
    batch: int
    length: int
    steps: int
    new: int
    times: int

    def options(self, device: str, **more: Any) -> dict[str, Any]:
        hidden = -(-self.width * 8 // 3 // 32) * 32
        model = {"width": self.width, "layers": self.layers, "heads": self.heads, "mlp_width": hidden, "kv_heads": None}
        model["qk_norm"] = False
        return {"model": model, "threads": 1, "device": device, **more}


ON_CPU = (
    Size("10 M", width=256, layers=4, heads=4, batch=8, length=512, steps=4, new=128, times=4),
    Size("100 M", width=768, layers=12, heads=12, batch=4, length=512, steps=2, new=64, times=1),
)
ON_GPU = (Size("1 B", width=2048, layers=18, heads=16, batch=8, length=2048, steps=10, new=256, times=2),)
PROMPT = 64
"""Tokens of the prompts that answers are generated to."""


def passes(size: Size, device: str, runs: int, log: Log) -> list[dict[str, Any]]:
    """Forward and backward over texts of one length, and of the lengths that texts have: ours packed, the peer's padded."""
    rows = []
    for what, length in ((f"{size.length} tokens each", size.length), ("texts of any length", None)):
        options = size.options(device, batch=size.batch, length=length, steps=size.steps)
        found = _contest("passes", [("hf_passes", LLAMA, {})], options, runs, log)
        goal = (1.2 if device == "cpu" else 1.0) if length else None
        name = f"{size.name}: forward and backward, {what}"
        rows.append(_row(name, "tokens/s a core", found, device, goal, told=_told(found, "parameters", "losses")))
        if not length:
            rows.append(_memory(size, found))
    return rows


def _memory(size: Size, found: dict[str, Standing]) -> dict[str, Any]:
    """Tokens of the texts for each MB that their forward and backward passes take beyond the weights."""
    made = {
        name: [run.result["items"] / (run.result["peak"] / 1e6) for run in standing.runs]
        for name, standing in found.items()
    }
    ours, peer = statistics.median(made[OURS]), statistics.median(made[LLAMA]) if made[LLAMA] else None
    row = {
        "name": f"{size.name}: memory of packed against padded texts", "unit": "tokens/MB", "ours": round(ours, 3),
        "peer": peer and round(peer, 3), "peer_name": LLAMA if peer else None, "ratio": peer and round(ours / peer, 2),
        "goal": None, "runs": len(found[OURS].runs),
        "told": {name: [run.result["peak"] for run in standing.runs] for name, standing in found.items()},
    }  # fmt: skip
    return row if peer else {**row, "reason": found[LLAMA].reason}


def generation(size: Size, device: str, runs: int, log: Log) -> list[dict[str, Any]]:
    """Greedy answers of `new` tokens to prompts of PROMPT, one at a time and eight."""
    rows = []
    for batch in (1, 8):
        options = size.options(device, batch=batch, length=PROMPT, new=size.new, times=size.times)
        peers: list[tuple[str, str, dict[str, Any]]] = [("hf_generating", "transformers generate", {})]
        peers.append(("hf_generating", "transformers generate, static cache", {"cache": "static"}))
        found = _contest("generating", peers, options, runs, log)
        goal = 1.5 if device == "cpu" else 1.0
        rows.append(_row(f"{size.name}: generation, batch {batch}", "tokens/s a core", found, device, goal))
    return rows


def _contest(
    ours: str, peers: list[tuple[str, str, dict[str, Any]]], options: dict[str, Any], runs: int, log: Log
) -> dict[str, Standing]:
    contestants = [Contestant(OURS, ours, options)]
    contestants += [Contestant(name, script, {**options, **more}, "transformers") for script, name, more in peers]
    source = inputs.texts(DOCUMENTS)
    return contest(contestants, source, source, runs, log)


def _row(
    name: str, unit: str, found: dict[str, Standing], device: str, goal: float | None, **more: Any
) -> dict[str, Any]:
    peers = [standing for peer, standing in found.items() if peer != OURS]
    unit = unit if device == "cpu" else "tokens/s"
    return row(name, unit, found[OURS], peers, clock="cpu" if device == "cpu" else "wall", goal=goal, **more)


def _told(found: dict[str, Standing], *keys: str) -> dict[str, Any]:
    return {
        name: {key: standing.runs[0].result[key] for key in keys} if standing.runs else {"reason": standing.reason}
        for name, standing in found.items()
    }


PARTS: dict[str, Callable[[Size, str, int, Log], list[dict[str, Any]]]] = {"passes": passes, "generation": generation}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", action="append", choices=[s.name for s in ON_CPU], help="one size of the CPU")
    parser.add_argument("--part", action="append", choices=sorted(PARTS), help="one part")
    parser.add_argument("--runs", type=int, default=3, help="rounds of which the median counts (3)")
    asked = parser.parse_args()
    log, rows = Log("model"), []
    log.note("machine", **machine())
    for size in ON_GPU if asked.device == "cuda" else ON_CPU:
        if asked.only and size.name not in asked.only:
            continue
        for name, measure in PARTS.items():
            if not asked.part or name in asked.part:
                for made in measure(size, asked.device, asked.runs, log):
                    rows.append(made)
                    print(told(made), flush=True)
                write(rows, asked.json)
    log.note("machine", **machine())
    return 0


if __name__ == "__main__":
    sys.exit(main())
