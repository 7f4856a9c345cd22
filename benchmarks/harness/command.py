"""The command line that all benchmarks share: parts by name, rows for people on the terminal and as JSON in a file."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.harness.measure import Log, machine


def run_parts(
    name: str, about: str, parts: Mapping[str, Callable[..., list[dict[str, Any]]]], full: Any, quick: Any
) -> int:
    """Measure the parts that the command line asks for. `full` and `quick` are dataclasses of amounts with `runs` and
    `clock`. Returns 0, whatever the figures say."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=about.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--only", action="append", choices=sorted(parts), help="one part; may be given several times")
    parser.add_argument("--quick", action="store_true", help="a look: little data, one run; its figures mean little")
    parser.add_argument("--runs", type=int, help="rounds of which the median counts (3)")
    parser.add_argument(
        "--clock", choices=("cpu", "wall"), default=full.clock, help=f"what the ratios go by ({full.clock})"
    )
    asked = parser.parse_args()
    amounts = replace(quick if asked.quick else full, clock=asked.clock)
    if asked.runs:
        amounts = replace(amounts, runs=max(1, asked.runs))
    log, rows = Log(name), []
    log.note("machine", **machine())
    for part, measure in parts.items():
        if asked.only and part not in asked.only:
            continue
        print(f"part {part}", file=sys.stderr, flush=True)
        for made in measure(amounts, log):
            rows.append(made)
            print(told(made), flush=True)
        write(rows, asked.json)
    log.note("machine", **machine())
    return 0


def write(rows: list[dict[str, Any]], path: Path | None) -> None:
    """The rows as JSON, where a file was asked for."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")


def told(made: dict[str, Any]) -> str:
    """A row as a line for people."""
    if made["peer"] is None:
        return f"{made['name']:55s} {made['ours']:10.4g} {made['unit']}, no peer: {made['reason']}"
    goal = f", goal {made['goal']}" if made["goal"] else ""
    other = "wall" if made.get("clock") == "cpu" else "cpu"
    cpu = f" (by {other} {made[other]['ratio']:.2f})" if other in made else ""
    return (
        f"{made['name']:55s} {made['ours']:10.4g} against {made['peer']:10.4g} {made['unit']} "
        f"of {made['peer_name']}: {made['ratio']:.2f}{cpu}{goal}"
    )
