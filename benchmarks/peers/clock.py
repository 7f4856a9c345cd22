"""How every contestant is timed, ours and theirs: the same few lines, in the contestant's own process.

Standard library only, since it runs in each peer's own environment. A contestant is told everything by a JSON file
(its only argument): `input` and `warm` folders, an empty folder `out`, where to write the `result`, and its options.
It does the work twice: on the few things in `warm`, so that imports, JIT and caches are paid for, then timed.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

TAG = "MMLM_BENCH_TAG"
"""Environment variable that tells the processes of one contestant, however they are started."""
_TICKS = os.sysconf("SC_CLK_TCK")


class Watch:
    """Laps of wall-clock and CPU seconds; the lap called `work` is the contest."""

    def __init__(self, gate: bool) -> None:
        self.gate = gate
        self.laps: dict[str, dict[str, float]] = {}

    @contextlib.contextmanager
    def lap(self, name: str) -> Iterator[None]:
        """Time what stands inside. With a gate, `work` starts when the caller sends a line."""
        if self.gate and name == "work":
            print("ready", flush=True)
            sys.stdin.readline()
        cpu, start = cpu_seconds(), time.monotonic()
        yield
        end = time.monotonic()
        self.laps[name] = {"seconds": end - start, "cpu": cpu_seconds() - cpu, "start": start, "end": end}


def cpu_seconds() -> float:
    """CPU seconds, user and system, of all processes of this contestant, and of those that they have waited for."""
    tag = f"{TAG}={os.environ.get(TAG, '')}".encode()
    total = 0.0
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            with open(f"/proc/{entry}/environ", "rb") as file:
                if tag not in file.read().split(b"\0") and int(entry) != os.getpid():
                    continue
            with open(f"/proc/{entry}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
        except OSError:
            continue
        total += sum(map(int, fields[11:15])) / _TICKS
    return total


def contest(work: Callable[[Path, Path, dict[str, Any], Watch], dict[str, Any]]) -> None:
    """Run `work(input, out, options, watch)` on the warm-up, then timed, and write what came of it.

    `work` returns how many `items` it made and whatever else is to be told; `bytes` is what lies in `out` afterwards.
    """
    told = json.loads(Path(sys.argv[1]).read_text())
    out = Path(told["out"])
    for name in ("warm", "run"):
        (out / name).mkdir(parents=True)
        watch = Watch(bool(told.get("gate")) and name == "run")
        result = work(Path(told["input" if name == "run" else "warm"]), out / name, told["options"], watch)
    result["bytes"] = sum(path.stat().st_size for path in (out / "run").rglob("*") if path.is_file())
    Path(told["result"]).write_text(json.dumps({**result, "laps": watch.laps}))


def files(folder: Path, *endings: str) -> list[Path]:
    """All files below `folder` with one of the endings, sorted."""
    return sorted(path for path in folder.rglob("*") if path.suffix in endings)


def batches(source: Path, options: dict[str, Any], count: int) -> tuple[list[list[list[int]]], int]:
    """`count` batches of `batch` texts of docs.jsonl as token ids (9 larger than the tokenizer's, whose place ours needs),
    and the size of the vocabulary. With `length`, texts are joined and cut to that."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    with (source / "docs.jsonl").open(encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for _, line in zip(range(2 * options["batch"] * count), file, strict=False)]
    rows = [[i + 9 for i in encoded.ids] for encoded in tokenizer.encode_batch(texts)]
    if length := options.get("length"):
        joined = [i for row in rows for i in row]
        rows = [joined[at : at + length] for at in range(0, len(joined) - length + 1, length)]
    batch = options["batch"]
    return [rows[n * batch : (n + 1) * batch] for n in range(count)], tokenizer.get_vocab_size() + 9


def wait(device: str) -> None:
    """Until the device has done what it was told."""
    if device != "cpu":
        import torch

        torch.cuda.synchronize()


class Memory:
    """How much memory is taken at most from now on, beyond what is taken now."""

    def __init__(self, device: str) -> None:
        self.device = device
        if device == "cpu":
            gc.collect()
            # freed pages, as of weights before they were made bf16, are no room ahead
            with contextlib.suppress(AttributeError, OSError):
                ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
            self.before = _status("VmRSS")
        else:
            import torch

            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()

    def peak(self) -> int:
        """Bytes."""
        if self.device == "cpu":
            return _status("VmHWM") - self.before
        import torch

        return int(torch.cuda.max_memory_allocated()) - self.before


def _status(name: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) << 10
