"""Planning from ten thousand to a hundred million records: time a record and memory.

`python -m benchmarks.plan_scale --json FILE [--most 100000000] [--plot docs/plan_scale.png]`. Manifests are made up (the
schema of a scan, sorted ids, two million records a file), planned in a process of their own, and removed. A hundred
million records take about 9 GB of disk for as long as it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.harness.environments import home
from benchmarks.harness.measure import Log, machine
from mmlm.corpus.records import PART, SCHEMA
from mmlm.corpus.scan import ROWS_PER_FILE

ROW_GROUP = 16_384
SIZES = (10_000, 100_000, 1_000_000, 10_000_000, 100_000_000)
FLAT = 0.8
"""How much of the speed at 1e4 records there has to be at 1e6."""


def write_manifest(folder: Path, count: int) -> int:
    """`count` records, four in five of them for training; a picture and a short text each. Returns the bytes."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(3)
    for number, first in enumerate(range(0, count, ROWS_PER_FILE)):
        last = min(count, first + ROWS_PER_FILE)
        with pq.ParquetWriter(folder / f"records-{number:05d}.parquet", SCHEMA, compression="zstd") as writer:
            for start in range(first, last, ROW_GROUP):
                writer.write_batch(_rows(rng, start, min(last, start + ROW_GROUP)))
    return sum(path.stat().st_size for path in folder.iterdir())


def _rows(rng: np.random.Generator, start: int, stop: int) -> pa.RecordBatch:
    count = stop - start
    ids = _texts(_digits(np.arange(start, stop), 10))
    hashes = _texts(np.frombuffer(rng.bytes(32 * count).hex().encode(), np.uint8).reshape(count, 64))
    same = {"task": "answer", "lang": "en", "source": "made-up", "license": "CC0-1.0"}
    splits = np.array(["train"] * 8 + ["val", "test"])[rng.integers(0, 10, count)]
    part = {
        "kind": "image",
        "role": "user",
        "text": None,
        "uri": "pictures/a.jpg",
        "data": None,
        "fields": None,
        "size": 170_000,
        "sha256": 64 * "0",
    }
    columns: dict[str, Any] = {
        "id": ids, "group": ids, "content_hash": hashes, "split": pa.array(splits),
        "label": pa.nulls(count, pa.string()), "labels": pa.nulls(count, pa.list_(pa.string())),
        "number": pa.nulls(count, pa.float64()), "answer": pa.array(["a picture"] * count),
        "parts": pa.ListArray.from_arrays(
            np.arange(count + 1, dtype=np.int32), pa.concat_arrays([pa.array([part], PART)] * 1).take(np.zeros(count, int))
        ),
        "text_bytes": rng.integers(5, 400, count), "inline_bytes": np.zeros(count, np.int64),
        "images": np.ones(count, np.int32), "sounds": np.zeros(count, np.int32),
        "videos": np.zeros(count, np.int32), "generation": np.zeros(count, np.int32),
        **{name: pa.DictionaryArray.from_arrays(np.zeros(count, np.int8), [value]).cast(pa.string())
           for name, value in same.items()},
    }  # fmt: skip
    return pa.record_batch([pa.array(columns[name]) for name in SCHEMA.names], schema=SCHEMA)


def _digits(numbers: np.ndarray, width: int) -> np.ndarray:
    """(n,) → (n, 1 + width) bytes: `r0000000042`."""
    made = np.empty((len(numbers), 1 + width), np.uint8)
    made[:, 0] = ord("r")
    for at in range(width):
        made[:, width - at] = ord("0") + numbers // 10**at % 10
    return made


def _texts(characters: np.ndarray) -> pa.Array:
    """(n, width) bytes of ASCII → an array of n texts."""
    count, width = characters.shape
    offsets = (np.arange(count + 1) * width).astype(np.int32)
    return pa.StringArray.from_buffers(count, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(characters)))


def measure(count: int, runs: int, folder: Path, log: Log) -> dict[str, Any]:
    """Medians of `runs` plans of a manifest of `count` records."""
    begun = time.perf_counter()
    size = write_manifest(folder / f"{count}", count)
    wrote = time.perf_counter() - begun
    warm = folder / "warm"
    if not warm.exists():
        write_manifest(warm, 1000)
    each = []
    for _ in range(runs):
        command = [sys.executable, "-m", "benchmarks.ours.planning", str(folder / f"{count}"), str(warm)]
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        each.append(json.loads(done.stdout))
        if each[-1]["records"] != count:
            raise RuntimeError(f"{each[-1]['records']} of {count} records were planned")
    shutil.rmtree(folder / f"{count}")
    made = {key: statistics.median(one[key] for one in each) for key in each[0]}
    log.note(f"plan {count}", wrote_seconds=round(wrote, 1), manifest_bytes=size, each=each)
    return {**made, "manifest_gb": round(size / 1e9, 3), "wrote_seconds": round(wrote, 1), "runs": runs}


def rows_of(found: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    alone = {"peer": None, "peer_name": None, "ratio": None, "goal": None, "reason": "no other tool plans shards ahead"}
    rows: list[dict[str, Any]] = [
        {
            "name": f"plan of {count:,} records", "unit": "records/s of CPU", "ours": round(count / one["cpu"]), **alone,
            "runs": one["runs"], "seconds": round(one["seconds"], 3), "cpu_seconds": round(one["cpu"], 3),
            "seconds_a_million": round(one["seconds"] / count * 1e6, 3), "peak_mb": round(one["peak_mb"]),
            "before_mb": round(one["before_mb"]), "slots": int(one["slots"]), "manifest_gb": one["manifest_gb"],
        }
        for count, one in found.items()
    ]  # fmt: skip
    if 10_000 in found and 1_000_000 in found:
        small, large = (count / found[count]["cpu"] for count in (10_000, 1_000_000))
        rows.append(
            {
                "name": "plan: cost a record, 1e6 records against 1e4", "unit": "records/s of CPU", "ours": round(large),
                "peer": round(small), "peer_name": "itself at 1e4", "ratio": round(large / small, 3), "goal": FLAT,
                "runs": found[1_000_000]["runs"],
            }
        )  # fmt: skip
    return rows


def draw(found: dict[int, dict[str, Any]], path: Path) -> None:
    """Microseconds a record and peak memory against the number of records."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    counts = list(found)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    left.plot(counts, [1e6 * found[n]["cpu"] / n for n in counts], "o-", label="CPU")
    left.plot(counts, [1e6 * found[n]["seconds"] / n for n in counts], "s--", label="wall clock", alpha=0.6)
    left.set(xscale="log", xlabel="records", ylabel="microseconds a record", ylim=(0, None), title="cost of planning")
    left.legend()
    right.plot(counts, [found[n]["peak_mb"] for n in counts], "o-")
    right.set(xscale="log", xlabel="records", ylabel="MB resident", ylim=(0, None), title="peak of memory")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan_scale", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--plot", type=Path, help="picture for the figure")
    parser.add_argument("--most", type=lambda text: int(float(text)), default=10_000_000, help="records at most (1e7)")
    parser.add_argument("--runs", type=int, default=3, help="plans up to 1e6 records, of which the median counts (3)")
    parser.add_argument("--quick", action="store_true", help="up to 1e5 records, once")
    asked = parser.parse_args()
    most, runs = (100_000, 1) if asked.quick else (asked.most, max(1, asked.runs))
    log = Log("plan_scale")
    log.note("machine", **machine())
    home().mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="plan-", dir=home()))
    found: dict[int, dict[str, Any]] = {}
    try:
        for count in SIZES:
            if count > most:
                break
            found[count] = one = measure(count, runs if count <= 1_000_000 else 1, folder, log)
            print(
                f"{count:>11,} records: {one['seconds']:8.2f} s, {1e6 * one['cpu'] / count:6.2f} µs of CPU a record, "
                f"peak {one['peak_mb']:.0f} MB ({one['before_mb']:.0f} before), {one['slots']:,.0f} shards, "
                f"manifest {one['manifest_gb']} GB written in {one['wrote_seconds']} s",
                flush=True,
            )
            if asked.json:
                asked.json.parent.mkdir(parents=True, exist_ok=True)
                asked.json.write_text(json.dumps(rows_of(found), indent=1) + "\n")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if asked.plot:
        draw(found, asked.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
