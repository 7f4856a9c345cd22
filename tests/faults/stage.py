"""Runs of the verb `shard` that are held at a point, struck, run again, and looked over."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mmlm.shards.faultpoints import VARIABLE
from mmlm.shards.verify import verify
from mmlm.world import quiet_environment
from tests.faults.corpus import NEVER, RECORDS, Corpus, ids
from tests.shards.conftest import shas

ROOT = Path(__file__).parents[2]
MARK = "MMLM_FAULTS_RUN"
"""Environment variable by which every process of a run is known, its grandchildren too."""
PATIENCE = 120.0
"""Seconds that a run may take to a point or to its end; an idle machine needs less than 15."""

NOTICE = {
    "RAY_health_check_initial_delay_ms": "5000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "6000",
    "RAY_health_check_failure_threshold": "4",
    "RAY_grpc_client_keepalive_time_ms": "5000",
    "RAY_grpc_client_keepalive_timeout_ms": "10000",
}
"""For a cluster and its drivers: a frozen node is given up after some 30 seconds. By default its driver, whose connection
to the frozen worker stays open, would wait for the keep-alive of 5 + 2 minutes, although the cluster knows better. With
2 seconds for an answer, three times, live nodes were given up where 25 processes shared 2 cores."""


def wait_for(what: str, true: Callable[[], object], seconds: float = PATIENCE, found: Callable[[], str] = str) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            raise AssertionError(f"after {seconds:.0f} s still not: {what} {found()}")
        time.sleep(0.02)


def marked(mark: str) -> list[int]:
    """Ids of the running processes of a run; those that have ended and wait for their parent are none."""
    wanted, found = f"{MARK}={mark}".encode(), []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def workers_of(mark: str) -> list[int]:
    """Ray's workers of a run or node, busy or idle; its agents, which are called ray::… too, are none."""
    return [pid for pid in marked(mark) if re.match(r"ray::(_write_unit|IDLE)", command_line(pid))]


def _pictured(pids: list[int]) -> str:
    """Id, state, parent and command of each, for the message of a failure."""
    lines = []
    for pid in pids:
        with contextlib.suppress(OSError):
            state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
            lines.append(f"{pid} {state} child of {parent}: {command_line(pid)[:300]}")
    return "\n".join(lines)


class Hold:
    """A folder in which one point of a run is held: `environment` asks for it, `reached` waits, `go` lets go."""

    def __init__(self, folder: Path, point: str, nth: int = 1) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.environment = {VARIABLE: f"{point}:{nth}={folder}"}

    def pid(self) -> int | None:
        """The process that is held, once it is."""
        return next((int(path.name.split("-")[1]) for path in self.folder.glob("reached-*")), None)

    def go(self) -> None:
        (self.folder / "go").touch()

    def passed(self) -> bool:
        return any(self.folder.glob("passed-*"))

    def arrivals(self) -> int:
        return len(list(self.folder.glob("arrived-*")))

    def reset(self) -> None:
        for path in self.folder.iterdir():
            path.unlink()


class Run:
    """The verb in a process of its own; what it says goes to the file `said`."""

    def __init__(
        self, corpus: Corpus, out: Path, said: Path, *, ray_from: int = NEVER, workers: int = 2, address: str = "",
        hold: Hold | None = None,
    ) -> None:  # fmt: skip
        self.mark, self.hold, self.ray_from = uuid.uuid4().hex, hold, ray_from
        self.said = said
        environment = {
            **{name: value for name, value in os.environ.items() if name not in (VARIABLE, MARK)},
            **quiet_environment(), "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT), MARK: self.mark,
            **(hold.environment if hold else {}), **(NOTICE if address else {}),
        }  # fmt: skip
        places = [str(corpus.manifest.path), str(corpus.data), str(out)]
        with said.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.driver", *places, str(ray_from), str(workers), address],
                env=environment, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True,
            )  # fmt: skip
        self.folders: set[str] = set()

    def held(self) -> int:
        """Wait until the run stands at its point; returns the process that does."""
        assert self.hold
        hold = self.hold
        wait_for("at the point", lambda: hold.pid() or self.process.poll() is not None)
        pid = hold.pid()
        assert pid, f"it ended with {self.process.returncode} before the point: {self.words()}"
        for process in marked(self.mark):  # where its Ray session lies, to see later that it is gone
            self.folders |= set(re.findall(r"/tmp/mmlm-ray-[\w-]+", command_line(process)))
        return pid

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def end(self) -> int:
        """The exit code."""
        return self.process.wait(PATIENCE)

    def words(self) -> str:
        return self.said.read_text(errors="replace").strip()

    def nothing_left(self) -> None:
        """No process of the run lives, and its Ray folder is gone; the reaper has some seconds for it."""
        wait_for("all processes ended", lambda: not marked(self.mark), 30, lambda: _pictured(marked(self.mark)))
        wait_for("the Ray folder removed", lambda: not any(Path(folder).exists() for folder in self.folders), 10)

    def end_all(self) -> None:
        for pid in marked(self.mark):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


class Stage:
    """What a cell works with: its corpus, its shard set `out`, and the runs it starts."""

    def __init__(self, corpus: Corpus, folder: Path) -> None:
        self.corpus, self.folder = corpus, folder
        self.out = folder / "out/shards"
        self.out.parent.mkdir(parents=True)
        self.runs: list[Run] = []
        self.shared_before = plasma()

    def start(self, point: str = "", nth: int = 1, **how: Any) -> Run:
        hold = Hold(self.folder / f"hold-{len(self.runs)}", point, nth) if point else None
        said = self.folder / f"said-{len(self.runs)}.txt"
        self.runs.append(Run(self.corpus, self.out, said, hold=hold, **how))
        return self.runs[-1]

    def run_again(self, **how: Any) -> None:
        run = self.start(**how)
        assert run.end() == 0, run.words()

    def journalled(self) -> set[str]:
        """The tars of the units that the journal knows."""
        path = self.out / ".journal.jsonl"
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        return {f"{json.loads(line)['name']}.tar" for line in lines}

    def journal(self) -> int:
        return len(self.journalled())

    def published(self) -> dict[str, tuple[int, int]]:
        """File name → (inode, time of the last write) of every tar that stands under its name."""
        return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in self.out.glob("*.tar")}

    def as_undisturbed(self) -> None:
        """The shard set is finished and, file by file and byte by byte, that of the undisturbed run."""
        assert shas(self.out) == self.corpus.shas
        assert sorted(p.name for p in self.out.iterdir()) == sorted(p.name for p in self.corpus.undisturbed.iterdir())
        found = ids(self.out)
        assert len(found) == len(set(found)) == RECORDS
        assert found == ids(self.corpus.undisturbed)
        assert verify(self.out) == []
        for run in self.runs:
            run.nothing_left()
        assert not plasma() - self.shared_before

    def close(self) -> None:
        for run in self.runs:
            run.end_all()


def plasma() -> set[str]:
    """Ray's object stores in shared memory that have a name: none, once a store is up."""
    return {path.name for path in Path("/dev/shm").glob("*plasma*")}


def one_line(run: Run) -> str:
    """What a failed run said: one sentence and no traceback."""
    words = run.words()
    assert "Traceback" not in words, words
    lines = words.splitlines()
    assert len(lines) == 1, words
    assert lines[0].startswith("mmlm: ")
    return lines[0]


@contextlib.contextmanager
def small_disk(folder: Path, size: str = "8m", inodes: int = 400) -> Iterator[Path]:
    """A tmpfs of `size` at `folder`. Skips the test where mounting is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size},nr_inodes={inodes}", "tmpfs", str(folder)],
        capture_output=True, text=True,
    ) if os.geteuid() == 0 else None  # fmt: skip
    if done is None or done.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here ({done.stderr.strip() if done else 'not root'})")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill_blocks(disk: Path) -> None:
    """Until no byte goes onto the disk any more."""
    with (disk / "ballast").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    _expect_full(lambda: (disk / "one-more").write_bytes(b"x"))
    (disk / "one-more").unlink()


def fill_inodes(disk: Path) -> None:
    """Until no name goes onto the disk any more; there is room for bytes."""
    (disk / "names").mkdir()
    with contextlib.suppress(OSError):
        for n in range(10**6):
            (disk / "names" / str(n)).touch()
    _expect_full(lambda: (disk / "one-more").touch())


def _expect_full(write: Callable[[], object]) -> None:
    with pytest.raises(OSError) as caught:
        write()
    assert caught.value.errno == errno.ENOSPC


def make_room(disk: Path) -> None:
    (disk / "ballast").unlink(missing_ok=True)
    subprocess.run(["rm", "-rf", str(disk / "names")], check=True)


@contextlib.contextmanager
def failing_calls(pid: int, calls: str, when: int | str, log: Path, error: str = "EIO") -> Iterator[None]:
    """While inside, the `when`-th of the system `calls` that the process makes fails with `error`, by strace."""
    if not shutil.which("strace"):
        pytest.skip("strace is not here (Debian and Ubuntu: apt-get install strace)")
    inject = [f"-einject={calls}:error={error}:when={when}", f"-etrace={calls}"]
    tracer = subprocess.Popen(["strace", "-f", "-qq", "-o", str(log), *inject, "-p", str(pid)], stderr=subprocess.PIPE)
    status = Path(f"/proc/{pid}/status")
    try:
        wait_for(
            "strace attached",
            lambda: f"TracerPid:\t{tracer.pid}\n" in status.read_text() or tracer.poll() is not None, 20,
        )  # fmt: skip
        if tracer.poll() is not None:
            assert tracer.stderr
            pytest.skip(f"strace cannot attach here ({tracer.stderr.read().decode().strip()})")
        yield
    finally:
        if tracer.poll() is None:
            tracer.terminate()
        tracer.wait(20)
    assert "(INJECTED)" in log.read_text(), f"no {calls} was made"
