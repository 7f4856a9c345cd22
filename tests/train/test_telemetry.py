"""The figures of a real training of two ranks in a terminal, one of whose readers is slow, against what they should be."""

from __future__ import annotations

import bisect
import contextlib
import json
import os
import pty
import re
import select
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from mmlm import artifacts
from mmlm.artifacts import Artifact
from mmlm.config import parse
from mmlm.data.collate import IGNORE, Batch
from mmlm.data.loader import Loader
from mmlm.features import spec as feature_spec
from mmlm.features.spec import AUDIO, IMAGE
from mmlm.model.flops import Shape, training_flops
from mmlm.train import weights
from mmlm.train.config import TrainConfig
from mmlm.train.objectives import Answering
from mmlm.train.schedule import learning_rate
from mmlm.world import World
from tests.faults.stage import ROOT
from tests.tracked import client

PEAK = 2e-4
"""TFLOP/s of a rank, as it is told: so little that the share of it is no small number."""
PAUSE = 2.0
"""Seconds for which the process that makes batches for rank 1 is stopped before its first one."""
STEPS, RANKS, PIECES = 6, 2, 2
CONFIG: dict[str, Any] = {
    "steps": STEPS,
    "precision": "fp32",
    "accumulate": PIECES,
    "zero": {"stage": 1},
    "save_every": 10,
    "log_every": 1,
    "model": {"width": 32, "layers": 1, "heads": 2, "attention": "prefix"},
    "data": {"batch": 16},
    "optimizer": {"clip": 0.5},
}
Row = dict[str, float]


class Watched(NamedTuple):
    made: Artifact
    rows: list[dict[str, Any]]
    """Of `metrics.jsonl`."""
    said: str
    """What stood in the terminal."""
    seen: list[tuple[float, float]]
    """When (seconds since 1970), and the resident bytes of both ranks then."""
    uri: str


class Watch:
    """A training into `out` in a pseudo-terminal, and what is seen of its processes from outside."""

    def __init__(self, command: list[str], out: Path) -> None:
        self.out = out
        self.screen, theirs = pty.openpty()
        environment = {
            **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MMLM_PEAK_TFLOPS": str(PEAK),
            "MMLM_DATA_WORKERS": "1",
        }  # fmt: skip
        self.process = subprocess.Popen(
            command, env=environment, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs
        )
        os.close(theirs)
        self.said, self.seen = b"", list[tuple[float, float]]()
        self.stopped: dict[int, float] = {}
        """Stopped process → when it goes on."""

    def end(self) -> int:
        """Look until it has ended; its exit code."""
        try:
            while self.process.poll() is None:
                planned = (self.out / "plan.json").exists()  # before that, batches are only tried out
                self._read(0.03 if planned else 0.2)
                ranks = children(self.process.pid, b"mmlm.launch.rank") if planned else []
                if len(ranks) == RANKS:
                    self.seen.append((time.time(), float(sum(map(resident, ranks)))))
                self._slow_down([pid for pid in ranks if b"RANK=1" in read(pid, "environ").split(b"\0")])
            self._read(0.2)
        finally:
            self.process.kill()
            os.close(self.screen)
        return self.process.returncode

    def _slow_down(self, ranks: list[int]) -> None:
        """Let the workers of these stand still once, for PAUSE seconds from their beginning."""
        for worker in (pid for rank in ranks for pid in children(rank, b"mmlm.data.worker")):
            if worker not in self.stopped:
                os.kill(worker, signal.SIGSTOP)
                self.stopped[worker] = time.monotonic() + PAUSE
        for worker, until in self.stopped.items():
            if time.monotonic() >= until:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker, signal.SIGCONT)

    def _read(self, seconds: float) -> None:
        while select.select([self.screen], [], [], seconds)[0]:
            try:
                self.said += os.read(self.screen, 1 << 16)
            except OSError:  # nobody writes any more
                return


def read(pid: int, name: str) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/{name}").read_bytes()
    return b""


def children(pid: int, module: bytes) -> list[int]:
    """Processes that run `module`, started by any thread of `pid`."""
    found = []
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            found += [int(child) for child in (thread / "children").read_text().split()]
    return [child for child in found if module in read(child, "cmdline").split(b"\0")]


def resident(pid: int) -> int:
    found = re.search(rb"VmRSS:\s+(\d+) kB", read(pid, "status"))
    return int(found[1]) * 1024 if found else 0


@pytest.fixture(scope="module")
def watched(keypad_shards: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Watched:
    folder = tmp_path_factory.mktemp("watched")
    out, uri = folder / "model", f"sqlite:///{folder}/mlflow.db"
    arguments = [str(keypad_shards.path), str(out), str(RANKS), json.dumps(CONFIG), uri]
    watch = Watch([sys.executable, "-m", "tests.train.driver", *arguments], out)
    assert watch.end() == 0, watch.said.decode()
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row["metrics"]]  # without what the stage tells at its end
    return Watched(artifacts.read(out), rows, watch.said.decode(), watch.seen, uri)


class Expected(NamedTuple):
    """What one process of plain PyTorch makes of the same batches."""

    losses: list[float]
    norms: list[float]
    given: list[dict[str, float]]
    weights: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def expected(keypad_shards: Artifact) -> Expected:
    config, spec = parse(TrainConfig, CONFIG, "test"), feature_spec.load(keypad_shards.path)
    torch.manual_seed(config.seed)
    model = weights.build(config.model, spec)
    decayed = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
    others = [p for p in model.parameters() if not any(p is d for d in decayed)]
    groups = [
        {"params": decayed, "weight_decay": config.optimizer.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    loader, objective = Loader(keypad_shards.path, config.data, config.seed, World()), Answering(config.loss, spec)
    made = Expected([], [], [], {})
    for step in range(config.steps):
        batch = loader.batch(step)
        terms, counts = objective(model, batch), objective.counts(batch)
        loss = torch.stack([t.sum * (t.weight / counts[name]) for name, t in terms.items()]).sum()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config.steps, config.optimizer.lr, config.schedule)
        made.given.append(given(batch, model))
        optimizer.step()
        made.losses.append(loss.item())
        made.norms.append(norm.item())
    made.weights.update({name: p.detach() for name, p in model.named_parameters()})
    return made


def given(batch: Batch, model: torch.nn.Module) -> dict[str, float]:
    """Mean loss of the targets of the records that give a picture, a sound, both, or neither; record by record."""
    with torch.no_grad():
        logits_AV = model(batch).answer_AV
    losses: dict[str, list[float]] = {}
    for (b, t), logits_V in zip((batch.target_BT != IGNORE).nonzero().tolist(), logits_AV, strict=True):
        mine = batch.tokens_BT[b][batch.segment_BT[b] == batch.segment_BT[b, t]]
        names = [name for name, slot in (("image", IMAGE), ("audio", AUDIO)) if (mine == slot).any()]
        loss = float(-logits_V.log_softmax(-1)[batch.target_BT[b, t]])
        losses.setdefault("+".join(names) or "text", []).append(loss)
    return {f"loss_given/{name}": statistics.mean(each) for name, each in losses.items()}


def cuts(shards: Artifact, step: int) -> list[Batch]:
    """The micro-batches of all ranks."""
    config = parse(TrainConfig, CONFIG, "test")
    ranks = (Loader(shards.path, config.data, 0, World(rank, RANKS), STEPS, workers=0) for rank in range(RANKS))
    return [batch for loader in ranks for batch in loader.batches(step, PIECES)]


def figures(watched: Watched) -> list[Row]:
    assert [row["step"] for row in watched.rows] == [1, 2, 3, 4, 5, 6]
    return [row["metrics"] for row in watched.rows]


def test_float32_on_two_ranks_equals_plain_pytorch(watched: Watched, expected: Expected):
    rows = figures(watched)
    assert [row["loss"] for row in rows] == pytest.approx(expected.losses, rel=1e-4)
    assert [row["gradient_norm"] for row in rows] == pytest.approx(expected.norms, rel=1e-3)
    assert max(expected.norms) > 0.5  # that it is the norm before clipping can be seen
    stored = weights.load_model(watched.made.path, feature_spec.load(watched.made.path)).state_dict()
    for name, parameter in expected.weights.items():
        assert torch.allclose(stored[name], parameter, atol=2e-4), name


def test_losses_by_what_is_given_are_those_of_their_records(watched: Watched, expected: Expected):
    kinds: set[str] = set()
    for row, wanted in zip(figures(watched), expected.given, strict=True):
        found = {name: value for name, value in row.items() if name.startswith("loss_given/")}
        assert found == pytest.approx(wanted, rel=1e-4)
        kinds |= found.keys()
    assert kinds == {f"loss_given/{name}" for name in ("image", "audio", "image+audio")}


def test_speed_padding_and_rate_are_those_of_the_batches(watched: Watched, keypad_shards: Artifact):
    config, spec = parse(TrainConfig, CONFIG, "test"), feature_spec.load(keypad_shards.path)
    for step, row in enumerate(figures(watched)):
        batches = cuts(keypad_shards, step)
        real, places = sum(int(b.valid_BT.sum()) for b in batches), sum(b.valid_BT.numel() for b in batches)
        flops = sum(training_flops(config.model, spec, Shape.of(batch)) for batch in batches)
        assert row["padding"] == pytest.approx(1 - real / places, abs=1e-9)
        assert row["tokens_per_second"] * row["step_seconds"] == pytest.approx(real)
        assert row["samples_per_second"] * row["step_seconds"] == pytest.approx(16)
        assert row["tflops"] * row["step_seconds"] == pytest.approx(flops / 1e12)
        assert row["mfu"] == pytest.approx(flops / row["step_seconds"] / (PEAK * 1e12 * RANKS))
        assert row["lr"] == learning_rate(step, STEPS, config.optimizer.lr, config.schedule)
    between = (watched.rows[-1]["time"] - watched.rows[0]["time"]) / 1000
    assert sum(row["step_seconds"] for row in figures(watched)[1:]) == pytest.approx(between, abs=0.25, rel=0.3)
    assert any(row["padding"] > 0.01 for row in figures(watched))


def test_a_slow_reader_of_any_rank_shows_as_waiting_for_data(watched: Watched):
    first, *others = figures(watched)
    assert PAUSE - 0.5 < first["data_wait"] * first["step_seconds"] <= first["step_seconds"] < PAUSE + 30
    assert first["data_wait"] <= first["outside"] + 0.1
    assert all(row["data_wait"] * row["step_seconds"] < PAUSE / 2 for row in others)


def test_memory_is_what_the_system_says(watched: Watched):
    times = [at for at, _ in watched.seen]
    for row in watched.rows[1:]:  # in the first step it grows
        near = bisect.bisect(times, row["time"] / 1000)
        sizes = [size for _, size in watched.seen[max(0, near - 3) : near + 3]]
        assert 0.8 * min(sizes) < row["metrics"]["memory_rss_bytes"] < 1.2 * max(sizes)


def test_the_terminal_shows_the_figures_of_the_rows(watched: Watched):
    shown = re.findall(
        r"train +(\d+) of 6 steps \(\d+ %\), [\d.,]+/s(?:, \d+:\d\d left)?, loss ([\d.]+), ([\d,]+) tokens/s, MFU (\d+%)",
        watched.said,
    )
    assert shown and shown[-1][0] == "6", watched.said
    rows = figures(watched)
    for step, *figured in shown:
        row = rows[int(step) - 1]
        assert figured == [f"{row['loss']:.3f}", f"{row['tokens_per_second']:,.0f}", f"{row['mfu']:.0%}"]


def test_what_came_is_told_beside_what_was_planned(watched: Watched):
    counts, rows = watched.made.counts, figures(watched)
    held = max(row["memory_rss_bytes"] for row in rows)
    step = statistics.median(row["step_seconds"] for row in rows[1:])  # the first holds the start
    size = sum(
        t.numel() for t in weights.load_model(watched.made.path, feature_spec.load(watched.made.path)).parameters()
    )
    assert counts["measured"] == {"parameters": size, "step_seconds": step, "memory_bytes": held}
    plan = json.loads((watched.made.path / "plan.json").read_text())
    assert counts["predicted"] == {name: plan[name] for name in ("parameters", "step_seconds", "memory_bytes")}
    assert counts["plan"] == (
        f"{step * 1e3:.1f} ms a step (planned {plan['step_seconds'] * 1e3:.1f}), {held / 1e9:.2f} GB "
        f"(planned {plan['memory_bytes'] / 1e9:.2f}), parameters as planned"
    )


def test_curves_have_every_step_once(watched: Watched):
    store = client(watched.uri)
    (run,) = [
        r for r in store.search_runs([store.get_experiment_by_name("faults").experiment_id]) if "digest" in r.data.tags
    ]
    for name in figures(watched)[-1]:
        if not name.startswith("loss_given/"):
            points = sorted((m.step, m.value) for m in store.get_metric_history(run.info.run_id, name))
            assert points == [(row["step"], pytest.approx(row["metrics"][name])) for row in watched.rows], name
    told = run.data.metrics
    assert told["plan/measured_step_seconds"] == pytest.approx(watched.made.counts["measured"]["step_seconds"])
    assert told["plan/predicted_memory_bytes"] == pytest.approx(watched.made.counts["predicted"]["memory_bytes"])
