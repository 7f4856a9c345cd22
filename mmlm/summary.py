"""What a finished run says: `summary.json` for scripts, a table with a few answers for people."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from mmlm import tracking_store
from mmlm.config import blank_credentials
from mmlm.features import spec as feature_spec
from mmlm.features.spec import SPECIAL_TOKENS
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
                parent = int(Path(f"/proc/{entry}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[1])
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
        match = re.search(r"^Pss:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8"), re.M)
    except OSError:
        return 0
    return int(match[1]) * 1024 if match else 0


def write(story: Story, places: Places, stages: Sequence[Stage], seconds: float, peak: int) -> dict[str, Any]:
    """Write `summary.json` below `--out` and return it. A skipped stage keeps the seconds that it took when it was made."""
    registered = json.loads((noun(places, "register").path / "registered.json").read_text(encoding="utf-8"))
    report = noun(places, "evaluate").path
    which = "student" if story.register.model == "student" and story.distill else "teacher"
    models = {
        name: {
            "parameters": checkpoint.counts["parameters"],
            "uri": registered["model_uri"] if name == which else str(checkpoint.path),
        }
        for name, checkpoint in checkpoints(story, places)
    }
    if all(s.skipped for s in stages):  # looking again is no run: what the run took is kept
        seconds, peak = _before(places.out / "summary.json", seconds, peak)
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
        "scores": json.loads((report / "scores.json").read_text(encoding="utf-8")),
        "registered": registered,
    }
    write_json(places.out / "summary.json", summary)
    return summary


def _before(path: Path, seconds: float, peak: int) -> tuple[float, int]:
    """Seconds and peak memory of the summary that is there, or those given."""
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
        return max(float(old["seconds"]), seconds), max(int(old["peak_rss_bytes"]), peak)
    except (OSError, ValueError, KeyError):
        return seconds, peak


def table(summary: dict[str, Any], out: Path) -> str:
    """Stages, scores, some answers, and where to look, for a terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    # the tables keep their width in a pipe and in a narrow window alike: wrapped numbers cannot be read
    console = Console(width=160, force_terminal=False, record=True, file=io.StringIO())
    stages = Table(title=f"{summary['story']}: stages", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("stage", "seconds", "counts"):
        stages.add_column(name, justify="right" if name == "seconds" else "left")
    for row in summary["stages"]:
        counts = ", ".join(f"{k} {v:,}" for k, v in row["counts"].items() if isinstance(v, int))
        stages.add_row(row["name"], "already there" if row["skipped"] else f"{row['seconds']:.1f}", counts)
    console.print(stages)
    scores = Table(title="scores on the test split [95 % interval]", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("task", "metric", "given"):
        scores.add_column(name, no_wrap=True)
    names = list(dict.fromkeys(r["model"] for r in summary["scores"]))
    for name in names:
        scores.add_column(name, justify="right", no_wrap=True)
    for key, cells in _rows(summary["scores"]).items():
        scores.add_row(*key, *(cells.get(n, "") for n in names))
    console.print(scores)
    text = console.export_text()
    sizes = ", ".join(f"{name} {m['parameters']:,}" for name, m in summary["models"].items())
    shown = out.relative_to(Path.cwd()) if out.is_relative_to(Path.cwd()) else out
    lines = [text.rstrip(), f"parameters: {sizes}", *examples(out)]
    if all(row["skipped"] for row in summary["stages"]):
        lines.append("nothing was recomputed: every stage was already there")
    lines += [
        f"model     {summary['model_uri']}: {summary['registered'].get('reason', '')}",
        f"report    {shown}/report/report.html",
        f"summary   {shown}/summary.json",
        f"tracking  {page(summary['tracking_uri'])}",
        f'ask it    mmlm predict --model {summary["model_uri"]} --text "…"{_flags(out)}{elsewhere(summary["tracking_uri"])}',
    ]
    return "\n".join(lines)


def page(uri: str) -> str:
    """Where to see what is tracked at `uri`: the page of a server, or the command that shows a store without one."""
    if uri.startswith(("http://", "https://", "databricks")):
        return uri
    return f"mlflow ui --backend-store-uri {shlex.quote(uri)}   (or `make ui`, beside the pipeline's page)"


def elsewhere(uri: str) -> str:
    """The flag by which a command finds the models registered at `uri`, where it would look elsewhere."""
    known = blank_credentials(tracking_store.absolute(tracking_store.default_uri()))
    return "" if not uri or tracking_store.absolute(uri) == known else f" --tracking-uri {shlex.quote(uri)}"


def _flags(out: Path) -> str:
    """The media that the model takes, as flags of `mmlm predict`."""
    modalities = feature_spec.load(out / "shards").modalities
    flags = {"image": "FILE", "audio": "FILE", "fields": "JSON"}
    return "".join(f" --{name} {value}" for name, value in flags.items() if name in modalities)


def _rows(scores: list[dict[str, Any]]) -> dict[tuple[str, str, str], dict[str, str]]:
    """(task, metric, given) → model → value with its interval: accuracy where there are classes, else F1 of sets of them,
    errors of numbers, or text scores."""
    chosen = [r for r in scores if r["lang"] == "all" and r["split"] == "test"]
    classed = {r["task"] for r in chosen if r["metric"] == "accuracy"}
    sets = {r["task"] for r in chosen if r["metric"] == "subset_accuracy"}
    others = ("exact_match", "chrf", "r2", "mae")
    rows: dict[tuple[str, str, str], dict[str, str]] = {}
    for r in chosen:
        shown = ("f1_micro", "f1_macro") if r["task"] in sets else others
        if r["metric"] == "accuracy" or (r["task"] not in classed and r["metric"] in shown):
            digits = 1 if r["metric"] == "chrf" else 3
            cell = f"{r['value']:.{digits}f} [{r['low']:.{digits}f}, {r['high']:.{digits}f}]"
            rows.setdefault((r["task"], r["metric"], r["modalities"]), {})[r["model"]] = cell
    return rows


def examples(out: Path, count: int = 5) -> list[str]:
    """A few questions of the test split with the answers that were given, the most being shown to the model."""
    from mmlm.data.modalities import keep_modalities
    from mmlm.data.reader import ShardReader
    from mmlm.features.text import Tokenizer

    rows = pq.read_table(out / "report" / "predictions.parquet").to_pylist()
    model = "student" if any(r["model"] == "student" for r in rows) else "teacher"
    fullest: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["model"] == model and len(row["given"]) >= len(fullest.get(row["id"], row)["given"]):
            fullest[row["id"]] = row
    reader, tokenizer = ShardReader(out / "shards", ("test",)), Tokenizer.load(out / "shards")
    lines = ["some of its answers:"]
    for number in range(0, len(reader), max(1, len(reader) // count)):
        sample = reader[number]
        row = fullest.get(sample.id)
        if row is None or len(lines) > count:
            continue
        given = row["given"].split("+")
        asked = keep_modalities(sample, set(given) - {"context"})
        question = _short(
            tokenizer.decode([int(t) for t in asked.tokens[: asked.answer_at] if t >= len(SPECIAL_TOKENS)])
        )
        media = " + ".join(name for name in given if name in sample.modalities)
        shown = f" ({media})" if media else ""
        mark = "✓" if row["answer"] == row["expected"] else "✗"
        lines.append(f"  {mark} {question}{shown}  →  {_short(row['answer'])}   (wanted: {_short(row['expected'])})")
    return lines


def _short(text: str | None) -> str:
    """One printable line of at most 80 characters."""
    line = "".join(c if c.isprintable() else " " for c in " ".join(str(text or "").split()))
    return line if len(line) <= 80 else line[:79] + "…"
