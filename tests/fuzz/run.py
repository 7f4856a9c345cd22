"""The long search: every target in turn, each in a process of its own, guided by the coverage of our own code.

    python -m tests.fuzz.run --minutes 60 [--targets image svg] [--jobs 1]

Atheris (libFuzzer) where it is installed (`pip install mmlm-workflows[fuzz]`), else a mutator of our own without
guidance. What may not come out is saved below tests/fuzz/regressions/TARGET/, one file per place in the code, and is
replayed by every test run from then on. Exit code 1 when something was found.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

MEMORY = 6 << 30
"""Address space of a fuzzing process: beyond it an allocation fails, which is a finding."""
RSS_MB = 2500
LONGEST = 64 << 10
"""Bytes of the longest input."""


def mutate(data: bytes, others: list[bytes], source: random.Random) -> bytes:
    """`data` with one to four small changes: bits, bytes, numbers, pieces cut, doubled or taken from another seed."""
    made = bytearray(data)
    for _ in range(source.randint(1, 4)):
        at = source.randrange(len(made) + 1)
        length = source.choice((1, 2, 4, 8, 64, 512))
        match source.randrange(7):
            case 0 if made:
                made[at % len(made)] ^= 1 << source.randrange(8)
            case 1:
                made[at : at + length] = source.randbytes(length)
            case 2:
                number = source.choice((0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0x80000000))
                made[at : at + 4] = number.to_bytes(4, source.choice(("little", "big")))
            case 3:
                del made[at : at + length]
            case 4:
                made[at:at] = made[at : at + length] * source.choice((1, 2, 16))
            case 5:
                other = source.choice(others)
                start = source.randrange(len(other) + 1)
                made[at : at + length] = other[start : start + length]
            case _:
                del made[at:]
    return bytes(made[:LONGEST])


class Findings:
    """Saves each kind of finding once per target: one per place in the code."""

    def __init__(self, name: str) -> None:
        from tests.fuzz.targets import REGRESSIONS

        self.folder, self.seen, self.runs, self.began = REGRESSIONS / name, set[str](), 0, time.monotonic()
        self.name = name

    def one(self, data: bytes) -> None:
        from tests.fuzz.targets import SECONDS, SLOWER, check

        self.runs += 1
        if self.runs >= 1024 and self.runs & (self.runs - 1) == 0:
            print(f"{self.name}: {self.runs:,} inputs in {time.monotonic() - self.began:.0f} s", flush=True)
        began = time.process_time()
        try:
            check(self.name, data)
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            place = next((f for f in reversed(frames) if "/mmlm/" in f.filename), frames[-1])
            self.save(
                f"{type(error).__name__}-{Path(place.filename).stem}-{place.lineno}", data, traceback.format_exc()
            )
        took = time.process_time() - began
        if took > SLOWER.get(self.name, SECONDS):
            self.save(f"slow-{min(9, int(took // SECONDS))}", data, f"{took:.1f} s")

    def save(self, kind: str, data: bytes, told: str) -> None:
        if kind in self.seen:
            return
        self.seen.add(kind)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{kind}-{hashlib.sha256(data).hexdigest()[:8]}"
        path.write_bytes(data)
        print(f"FOUND {path}: {told}", flush=True)


def search(name: str, seconds: int, folder: Path) -> None:
    """Fuzz one target in this process until the time is over."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    try:
        import atheris  # type: ignore[import-untyped]
    except ImportError:
        _search_alone(name, seconds)
        return
    with atheris.instrument_imports(include=["mmlm", "pypdf", "warcio"]):
        from tests.fuzz.targets import TARGETS
    corpus = folder / name
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(TARGETS[name].seeds()):
        (corpus / f"seed-{number:03d}").write_bytes(seed)
    findings = Findings(name)
    options = [
        f"-max_total_time={seconds}", f"-max_len={LONGEST}", "-timeout=30", f"-rss_limit_mb={RSS_MB}", "-verbosity=0",
        "-print_final_stats=1", f"-artifact_prefix={folder}/crash-{name}-", str(corpus),
    ]  # fmt: skip
    atheris.Setup([sys.argv[0], *options], findings.one)
    atheris.Fuzz()


def _search_alone(name: str, seconds: int) -> None:
    from tests.fuzz.targets import TARGETS

    findings, seeds, source = Findings(name), TARGETS[name].seeds(), random.Random()
    while time.monotonic() - findings.began < seconds:
        findings.one(mutate(source.choice(seeds), seeds, source))
    print(f"{name}: {findings.runs:,} inputs", flush=True)


def main() -> int:
    if sys.argv[1:2] == ["--one"]:  # target, seconds, folder: before anything is imported that is to be instrumented
        search(sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
        return 0
    from tests.fuzz.targets import REGRESSIONS, TARGETS

    parser = argparse.ArgumentParser(description="Fuzz the readers and decoders.")
    parser.add_argument("--minutes", type=float, default=60, help="for all targets together")
    parser.add_argument("--targets", nargs="*", default=list(TARGETS))
    given = parser.parse_args()
    before = set(REGRESSIONS.glob("*/*"))
    folder = Path(tempfile.mkdtemp(prefix="mmlm-fuzz-"))
    each = given.minutes * 60 / len(given.targets)
    for name in given.targets:
        end = time.monotonic() + each
        while (left := end - time.monotonic()) > 1:  # again after a crash that ended the process
            print(f"== {name}: {left:.0f} s", flush=True)
            command = [sys.executable, "-m", "tests.fuzz.run", "--one", name, str(int(left)), str(folder)]
            # libraries complain on stderr of every broken file, gigabytes of it
            subprocess.run(command, stderr=subprocess.DEVNULL, timeout=left + 120, check=False)
            for artifact in folder.glob(f"crash-{name}-*"):
                (REGRESSIONS / name).mkdir(parents=True, exist_ok=True)
                kept = REGRESSIONS / name / artifact.name.removeprefix(f"crash-{name}-")
                artifact.replace(kept) if artifact.stat().st_dev == REGRESSIONS.stat().st_dev else kept.write_bytes(
                    artifact.read_bytes()
                )
                artifact.unlink(missing_ok=True)
                print(f"FOUND {kept}: the process ended", flush=True)
    found = set(REGRESSIONS.glob("*/*")) - before
    print(f"done: {len(found)} findings", *sorted(map(str, found)), sep="\n", flush=True)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
