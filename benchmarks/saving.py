"""Checkpoints of 2 ranks: how long a step waits for one, until it is on the disk, and how long going on takes.

Ours, `full` and `sharded`, and `save_checkpoint` and `load_checkpoint` of DeepSpeed, of the same engine in turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.harness.command import told, write
from benchmarks.harness.measure import Log, machine
from mmlm.launch.local import ranks

MODEL = {"width": 768, "layers": 8, "heads": 12}
WHAT = {"waited": "a step waits", "safe": "until it is on the disk", "loaded": "going on"}


def rows_of(stage: int, found: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """MB of the checkpoint a second, so that more is better: by the medians of the rounds."""
    size = found["full"][0]["bytes"] / 1e6
    made = []
    for key, words in WHAT.items():
        rates = {form: round(size / statistics.median(r[key] for r in rounds), 1) for form, rounds in found.items()}
        for form in ("full", "sharded"):
            made.append({
                "name": f"checkpoint of {size:,.0f} MB at ZeRO {stage}, {form}: {words}", "unit": "MB/s", "ours": rates[form],
                "peer": rates["deepspeed"], "peer_name": "DeepSpeed save_checkpoint, load_checkpoint",
                "ratio": round(rates[form] / rates["deepspeed"], 3), "goal": None, "runs": len(found[form]),
                "seconds": {name: [round(r[key], 3) for r in rounds] for name, rounds in found.items()},
            })  # fmt: skip
    return made


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.saving", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--runs", type=int, default=3, help="rounds of which the median counts (3)")
    asked = parser.parse_args()
    log, rows = Log("saving"), []
    log.note("machine", **machine())
    for stage in (2, 3):
        with tempfile.TemporaryDirectory(dir=".") as out:  # a disk, not memory
            args = {"model": MODEL, "stage": stage, "rounds": asked.runs, "out": str(Path(out).resolve())}
            ranks(2)("benchmarks.ours.saving:on_rank", args, log=Path(out))
            found = json.loads(Path(out, "found.json").read_text())
        log.note("stage", stage=stage, found=found)
        for made in rows_of(stage, found):
            rows.append(made)
            print(told(made), flush=True)
        write(rows, asked.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
