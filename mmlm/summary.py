"""What a finished run says: `summary.json` for scripts, a table with a few answers for people."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from mmlm.config import blank_credentials
from mmlm.storage import write_json
from mmlm.story import Places, Stage, Story, checkpoints, noun


class PeakMemory:
    """Largest proportional memory (PSS) of this process and all below it, sampled every second."""

    def __init__(self) -> None:
        self.peak = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(timeout=5)

    def _watch(self) -> None:
        while True:
            self.peak = max(self.peak, sum(_pss(pid) for pid in _family(os.getpid())))
            if self._over.wait(1.0):
                return


def _family(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                parent = int(Path(f"/proc/{entry}/stat").read_text().rsplit(")", 1)[1].split()[1])
            except (OSError, IndexError, ValueError):
                continue
            children.setdefault(parent, []).append(int(entry))
    found, todo = [], [pid]
    while todo:
        found.append(todo.pop())
        todo += children.get(found[-1], [])
    return found


def _pss(pid: int) -> int:
    try:
        match = re.search(r"^Pss:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)
    except OSError:
        return 0
    return int(match[1]) * 1024 if match else 0


def write(story: Story, places: Places, stages: Sequence[Stage], seconds: float, peak: int) -> dict[str, Any]:
    """Write `summary.json` below `--out` and return it. A skipped stage keeps the seconds that it took when it was made."""
    registered = json.loads((noun(places, "register").path / "registered.json").read_text())
    report = noun(places, "evaluate").path
    which = "student" if story.register.model == "student" and story.distill else "teacher"
    models = {
        name: {
            "parameters": checkpoint.counts["parameters"],
            "uri": registered["model_uri"] if name == which else str(checkpoint.path),
        }
        for name, checkpoint in checkpoints(story, places)
    }
    summary = {
        "story": story.name,
        "model_uri": registered["model_uri"],
        "tracking_uri": blank_credentials(places.tracking_uri or ""),
        "seconds": round(seconds, 1),
        "peak_rss_bytes": peak,
        "models": models,
        "stages": [
            {
                "name": s.name,
                "seconds": s.artifact.seconds if s.skipped else round(s.seconds, 1),
                "skipped": s.skipped,
                "counts": s.artifact.counts,
            }
            for s in stages
        ],
        "scores": json.loads((report / "scores.json").read_text()),
        "registered": registered,
    }
    write_json(places.out / "summary.json", summary)
    return summary


def table(summary: dict[str, Any], out: Path) -> str:
    """Stages, scores, some answers, and where to look, for a terminal."""
    from rich.console import Console
    from rich.table import Table

    # a pipe has no width of its own; 100 columns keep the tables whole there
    console = Console(width=None if os.isatty(1) else 100, force_terminal=False, record=True, file=open(os.devnull, "w"))
    stages = Table(title=f"{summary['story']}: stages", title_justify="left")
    for name in ("stage", "seconds", "counts"):
        stages.add_column(name, justify="right" if name == "seconds" else "left")
    for row in summary["stages"]:
        counts = ", ".join(f"{k} {v:,}" for k, v in row["counts"].items() if isinstance(v, int))
        stages.add_row(row["name"], "already there" if row["skipped"] else f"{row['seconds']:.1f}", counts)
    console.print(stages)
    scores = Table(title="scores on the test split, with 95 % intervals", title_justify="left")
    for name in ("task", "metric", "given"):
        scores.add_column(name)
    names = list(dict.fromkeys(r["model"] for r in summary["scores"]))
    for name in names:
        scores.add_column(name, justify="right")
    for key, cells in _rows(summary["scores"]).items():
        scores.add_row(*key, *(cells.get(n, "") for n in names))
    console.print(scores)
    text = console.export_text()
    sizes = ", ".join(f"{name} {m['parameters']:,}" for name, m in summary["models"].items())
    shown = out.relative_to(Path.cwd()) if out.is_relative_to(Path.cwd()) else out
    lines = [text.rstrip(), f"parameters: {sizes}", *examples(out / "report" / "predictions.parquet")]
    if all(row["skipped"] for row in summary["stages"]):
        lines.append("nothing was recomputed: every stage was already there")
    lines += [
        f"model     {summary['model_uri']}: {summary['registered'].get('reason', '')}",
        f"report    {shown}/report/report.html",
        f"summary   {shown}/summary.json",
        f"tracking  mlflow ui --backend-store-uri {summary['tracking_uri']}   (or `make ui`, beside the pipeline's page)",
        f'ask it    mmlm predict --model {summary["model_uri"]} --text "…" --image FILE --audio FILE',
    ]
    return "\n".join(lines)


def _rows(scores: list[dict[str, Any]]) -> dict[tuple[str, str, str], dict[str, str]]:
    """(task, metric, given) → model → value with its interval; the headline metrics over all languages."""
    headline = ("accuracy", "f1_macro", "exact_match", "chrf")
    rows: dict[tuple[str, str, str], dict[str, str]] = {}
    for r in scores:
        if r["metric"] in headline and r["lang"] == "all" and r["split"] == "test":
            cell = f"{r['value']:.3f} [{r['low']:.3f}, {r['high']:.3f}]"
            rows.setdefault((r["task"], r["metric"], r["modalities"]), {})[r["model"]] = cell
    return rows


def examples(path: Path, count: int = 5) -> list[str]:
    """A few questions of the test split with the answers that were given."""
    rows = pq.read_table(path).to_pylist() if path.exists() else []
    models = {r["model"] for r in rows}
    model = "student" if "student" in models else "teacher"
    chosen = [r for r in rows if r["model"] == model]
    widest = max((len(r["given"]) for r in chosen), default=0)
    chosen = [r for r in chosen if len(r["given"]) == widest]
    lines = ["some of its answers:"] if chosen else []
    for row in chosen[:: max(1, len(chosen) // count)][:count]:
        mark = "✓" if row["correct"] else "✗"
        lines.append(f"  {mark} {row.get('question') or row['task']}  →  {row['answer']}   (wanted: {row['expected']})")
    return lines
