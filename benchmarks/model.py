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
from benchmarks.harness.measure import Contestant, Log, Standing, contest, machine

OURS = "mmlm"
LLAMA = "transformers LlamaForCausalLM"
DOCUMENTS = 400


@dataclass(frozen=True)
class Size:
    """A model; `batch` texts make a pass, of `length` tokens or as long as they are, `steps` passes a lap; answers have `new`
    tokens."""

    name: str
    width: int
    layers: int
    heads: int
    batch: int
    length: int
    steps: int
    new: int

    def options(self, device: str, **more: Any) -> dict[str, Any]:
        hidden = -(-self.width * 8 // 3 // 32) * 32
        model = {"width": self.width, "layers": self.layers, "heads": self.heads, "mlp_width": hidden, "kv_heads": None}
        model["qk_norm"] = False
        return {"model": model, "threads": 1, "device": device, **more}


ON_CPU = (
    Size("10 M", width=256, layers=4, heads=4, batch=8, length=512, steps=4, new=128),
    Size("100 M", width=768, layers=12, heads=12, batch=4, length=512, steps=2, new=64),
)
ON_GPU = (Size("1 B", width=2048, layers=18, heads=16, batch=8, length=2048, steps=10, new=256),)
PROMPT = 64
"""Tokens of the prompts that answers are generated to."""


def passes(size: Size, device: str, runs: int, log: Log) -> list[dict[str, Any]]:
    """Forward and backward over texts of one length, and of the lengths that texts have: ours packed, the peer's padded."""
    options = size.options(device, batch=size.batch, length=size.length, steps=size.steps)
    found = _contest("passes", [("hf_passes", LLAMA, {})], options, runs, log)
    what = f"{size.name}: forward and backward"
    return [
        _row(f"{what}, {size.length} tokens each", found, "even", device, 1.2 if device == "cpu" else 1.0),
        _row(f"{what}, texts as long as they are", found, "uneven", device, None),
        _memory(f"{size.name}: memory of packed against padded texts", found, "uneven"),
        _memory(f"{size.name}: memory of {size.length} tokens each", found, "even"),
    ]


def generation(size: Size, device: str, runs: int, log: Log) -> list[dict[str, Any]]:
    """Greedy answers of `new` tokens to prompts of PROMPT, one at a time and eight."""
    options = size.options(device, batch=8, sizes=[1, 8], length=PROMPT, new=size.new)
    peers: list[tuple[str, str, dict[str, Any]]] = [("hf_generating", "transformers generate", {})]
    peers.append(("hf_generating", "transformers generate, static cache", {"cache": "static"}))
    found, goal = _contest("generating", peers, options, runs, log), 1.5 if device == "cpu" else 1.0
    return [_row(f"{size.name}: generation, {lap}", found, lap, device, goal) for lap in ("batch 1", "batch 8")]


def _contest(
    ours: str, peers: list[tuple[str, str, dict[str, Any]]], options: dict[str, Any], runs: int, log: Log
) -> dict[str, Standing]:
    contestants = [Contestant(OURS, ours, options)]
    contestants += [Contestant(name, script, {**options, **more}, "transformers") for script, name, more in peers]
    source = inputs.texts(DOCUMENTS)
    return contest(contestants, source, source, runs, log)


def _row(name: str, found: dict[str, Standing], lap: str, device: str, goal: float | None) -> dict[str, Any]:
    """Tokens of lap `lap` a second, medians; the best of the peers by the clock that counts."""
    clock = "cpu" if device == "cpu" else "wall"
    rates = {
        peer: {each: standing.rates(each, (lap,), lap) for each in ("wall", "cpu")} for peer, standing in found.items()
    }
    return _against(name, "tokens/s a core" if device == "cpu" else "tokens/s", rates, found, clock, goal)


def _memory(name: str, found: dict[str, Standing], lap: str) -> dict[str, Any]:
    """Tokens of a pass for each MB that the passes take at most, beyond the weights: gradients, and what is kept for them."""
    rates = {}
    for peer, standing in found.items():
        share = [
            run.result[lap] / len(run.result[f"{lap} losses"]) / run.result[f"{lap} peak"] for run in standing.runs
        ]
        rates[peer] = {"memory": [round(one * 1e6, 3) for one in share]}
    return _against(name, "tokens/MB", rates, found, "memory", None)


def _against(
    name: str, unit: str, rates: dict[str, dict[str, list[float]]], found: dict[str, Standing], by: str,
    goal: float | None,
) -> dict[str, Any]:  # fmt: skip
    middle = {
        peer: {each: statistics.median(runs) for each, runs in kinds.items()}
        for peer, kinds in rates.items() if found[peer].runs
    }  # fmt: skip
    made: dict[str, Any] = {"name": name, "unit": unit, "ours": middle[OURS][by], "runs": len(found[OURS].runs)}
    peers = [peer for peer in middle if peer != OURS]
    if not peers:
        reason = "; ".join(standing.reason for standing in found.values() if standing.reason)
        return {**made, "peer": None, "peer_name": None, "ratio": None, "goal": goal, "reason": reason}
    best = max(peers, key=lambda peer: middle[peer][by])
    ratio = {each: round(middle[OURS][each] / middle[best][each], 3) for each in middle[OURS]}
    beside = {each: {"ours": rates[OURS][each], "peer": rates[best][each], "ratio": ratio[each]} for each in ratio}
    others = {peer: middle[peer][by] for peer in peers}
    return {
        **made, "peer": middle[best][by], "peer_name": best, "ratio": ratio[by], "goal": goal, "clock": by, **beside,
        "peers": others,
    }  # fmt: skip


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
