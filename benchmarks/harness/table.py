"""Rows of a benchmark as a Markdown table: `python -m benchmarks.harness.table runs/bench/sharding.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def table(rows: list[dict[str, Any]]) -> str:
    """A line per row; ratios by CPU time and by the wall clock where both are known."""
    lines = [
        "| what | unit | ours | best peer | | ratio, CPU | ratio, wall | goal |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        goal = f"≥ {row['goal']}{' ✓' if (row['ratio'] or 0) >= row['goal'] else ' **missed**'}" if row["goal"] else ""
        if row["peer"] is None:
            lines.append(
                f"| {row['name']} | {row['unit']} | {row['ours']:,} | — | {_short(row['reason'])} | — | — | {goal} |"
            )
            continue
        cpu = f"{row['cpu']['ratio']:.2f}" if "cpu" in row else "—"
        wall = f"{row['wall']['ratio']:.2f}" if "wall" in row else f"{row['ratio']:.2f}"
        lines.append(
            f"| {row['name']} | {row['unit']} | {row['ours']:,} | {row['peer']:,} | {row['peer_name']} "
            f"| {cpu} | {wall} | {goal} |"
        )
    return "\n".join(lines)


def _short(reason: str) -> str:
    reason = reason.replace("|", "/").replace("\n", " ")
    return reason if len(reason) <= 120 else reason[:117] + "..."


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(table(json.loads(Path(name).read_text())))
