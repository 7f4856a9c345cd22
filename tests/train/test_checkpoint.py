"""Checkpoints on the disk: what stays, what a kill at every file boundary leaves, what damage does. No ranks needed."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mmlm.artifacts import Artifact
from mmlm.shards.faultpoints import VARIABLE
from mmlm.storage import sha256_file
from mmlm.train import checkpoint
from mmlm.train.checkpoint import STATE, Policy
from mmlm.train.saved_tensors import RANK, Piece, open_tensors
from mmlm.train.weights import write_tensors
from tests.faults.stage import ROOT, Hold, wait_for
from tests.train.runs import SMALL

TENSORS = {
    kind: {name: torch.arange(n * 8, dtype=torch.float32) + n for n, name in enumerate(("a.weight", "b.norm"))}
    for kind in ("weight", "exp_avg")
}
KEEP = Policy()
BOUNDARIES = 1 + len(TENSORS) + 2
"""Of a save that drops nothing: before the first file, after each of them, after state.json, after the rename."""


def save(folder: Path, step: int, policy: Policy = KEEP, **state: Any) -> None:
    moved = {kind: {name: t + step for name, t in named.items()} for kind, named in TENSORS.items()}
    checkpoint.save(folder, step, moved, {"probe": step / 7, **state}, policy)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_written_is_read_and_hashed_as_it_goes(tmp_path: Path):
    tensors = {
        "half": torch.randn(3, 5).bfloat16(),
        "one": torch.tensor(2.0),
        "none": torch.zeros(0, 4),
        "turned": torch.randn(4, 6).t(),
        "count": torch.tensor([1, 2]),
    }
    digest = write_tensors(tensors, tmp_path / "t.safetensors")
    assert digest == sha256_file(tmp_path / "t.safetensors")
    read = load_file(tmp_path / "t.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor), name


def test_the_newest_the_best_and_some_for_good_stay(tmp_path: Path):
    policy = Policy(keep=2, every=40, best=1)
    for step in range(10, 110, 10):
        save(tmp_path, step, policy, score=abs(step - 30) + 0.5)
    assert sorted(checkpoint.steps(tmp_path)) == [30, 40, 80, 90, 100]
    best = checkpoint.best(tmp_path)
    assert best is not None and best.step == 30
    save(tmp_path, 110, Policy(keep=1))
    assert names(tmp_path) == ["step-00000110"]


@pytest.mark.parametrize("boundary", range(1, BOUNDARIES + 1))
def test_a_save_killed_at_a_file_boundary_never_shadows_a_good_one(tmp_path: Path, boundary: int):
    folder = tmp_path / "checkpoints"
    save(folder, 1)
    kill_at(boundary, folder, tmp_path / "hold", step=2)
    saved = checkpoint.newest(folder)
    assert saved is not None
    assert saved.step == (2 if boundary == BOUNDARIES else 1)
    assert torch.equal(saved.tensors()["exp_avg"]["a.weight"], TENSORS["exp_avg"]["a.weight"] + saved.step)
    save(folder, 3)
    assert names(folder) == [checkpoint.name_of(saved.step), "step-00000003"]


def test_dropping_old_ones_can_be_killed_anywhere(tmp_path: Path):
    for boundary in (BOUNDARIES + 1, BOUNDARIES + 2, BOUNDARIES + 3, BOUNDARIES + 4):
        folder = tmp_path / f"{boundary}" / "checkpoints"
        save(folder, 1)
        save(folder, 2)
        kill_at(boundary, folder, tmp_path / f"{boundary}" / "hold", step=3, keep=1)
        saved = checkpoint.newest(folder, lambda text: pytest.fail(text))
        assert saved is not None and saved.step == 3
        save(folder, 4, Policy(keep=1))
        assert names(folder) == ["step-00000004"]


def test_these_are_all_boundaries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hold = Hold(tmp_path / "hold", checkpoint.POINT, nth=99)
    monkeypatch.setenv(VARIABLE, hold.environment[VARIABLE])
    folder = tmp_path / "checkpoints"
    save(folder, 1)
    assert hold.arrivals() == BOUNDARIES
    save(folder, 2)
    save(folder, 3, Policy(keep=1))
    assert hold.arrivals() == 3 * BOUNDARIES + 4  # two for each that was dropped


def kill_at(boundary: int, folder: Path, hold_folder: Path, step: int, keep: int = 3, by_ranks: bool = False) -> None:
    """SIGKILL a process that saves when it comes to the `boundary`-th of its file boundaries."""
    hold = Hold(hold_folder, checkpoint.POINT, nth=boundary)
    child = multiprocessing.get_context("fork").Process(
        target=_save_held, args=(hold.environment[VARIABLE], folder, step, keep, by_ranks)
    )
    child.start()
    wait_for("the save at its boundary", hold.pid, 30)
    assert child.pid is not None and hold.pid() == child.pid
    os.kill(child.pid, signal.SIGKILL)
    child.join(30)
    assert child.exitcode == -signal.SIGKILL


def _save_held(variable: str, folder: Path, step: int, keep: int, by_ranks: bool) -> None:
    os.environ[VARIABLE] = variable
    torch.set_num_threads(1)
    if by_ranks:
        save_by_ranks(folder, step)
    else:
        save(folder, step, Policy(keep=keep))


RANKS = 3
PIECES_BOUNDARIES = 1 + 2 * RANKS + 2
"""Of a save by several ranks: before the first file, after each rank's file and word, after state.json, after the rename."""


def pieces_of(rank: int, step: int) -> dict[str, dict[str, Piece]]:
    """What one of the ranks holds when parameters are laid end to end and cut, so that some cut goes through one."""
    made: dict[str, dict[str, Piece]] = {}
    for kind, named in TENSORS.items():
        ends, begin = sum(t.numel() for t in named.values()), 0
        low, high = ends * rank // RANKS, ends * (rank + 1) // RANKS
        for name, tensor in named.items():
            a, b = (min(max(at - begin, 0), tensor.numel()) for at in (low, high))
            if a < b or not tensor.numel():
                shaped = (tensor + step).view(-1, 2)
                made.setdefault(kind, {})[name] = Piece(a, shaped.shape, shaped.flatten()[a:b])
            begin += tensor.numel()
    return made


def save_by_ranks(folder: Path, step: int) -> None:
    temporary = checkpoint.begin(folder, step)
    assert temporary is not None
    for rank in reversed(range(RANKS)):
        assert not checkpoint.have_written(temporary, RANKS)
        checkpoint.save_pieces(temporary, rank, pieces_of(rank, step))
        for missing in (RANK.format(rank), RANK.format(rank).replace(".safetensors", ".json")):
            (temporary / missing).rename(temporary / "elsewhere")
            assert not checkpoint.have_written(temporary, RANKS)
            (temporary / "elsewhere").rename(temporary / missing)
    assert checkpoint.have_written(temporary, RANKS)
    checkpoint.commit(temporary, step, {"probe": step / 7, "ranks": RANKS}, KEEP)


def test_what_ranks_wrote_in_pieces_is_read_whole_and_in_any_other_pieces(tmp_path: Path):
    save(tmp_path / "full", 1)
    save_by_ranks(tmp_path / "pieces", 1)
    assert names(tmp_path / "pieces/step-00000001") == [*(RANK.format(rank) for rank in range(RANKS)), STATE]
    for folder in (tmp_path / "full", tmp_path / "pieces"):
        saved = checkpoint.newest(folder)
        assert saved is not None
        found = saved.tensors()
        assert found.keys() == TENSORS.keys()
        for kind, named in TENSORS.items():
            assert found[kind].keys() == named.keys()
            for name, tensor in named.items():
                assert torch.equal(found[kind][name].flatten(), tensor + 1)
                for first in range(tensor.numel()):
                    for count in range(1, tensor.numel() - first + 1):
                        run = found[kind].run(name, first, count)
                        assert torch.equal(run, tensor[first : first + count] + 1), (name, first, count)


def test_rows_that_are_read_of_a_whole_tensor_are_cut_where_they_must_be(tmp_path: Path):
    tensors = {"cube": torch.randn(5, 3, 2), "one": torch.tensor(2.5), "row": torch.randn(7)}
    checkpoint.save(tmp_path, 1, {"weight": tensors}, {"probe": 0.0}, KEEP)
    found = checkpoint.read(tmp_path, 1).tensors()["weight"]
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor) and found[name].shape == tensor.shape
        for first in range(tensor.numel()):
            for count in range(1, tensor.numel() - first + 1):
                assert torch.equal(found.run(name, first, count), tensor.flatten()[first : first + count])


@pytest.mark.parametrize("boundary", range(1, PIECES_BOUNDARIES + 1))
def test_ranks_killed_at_any_boundary_of_their_save_never_shadow_a_good_one(tmp_path: Path, boundary: int):
    folder = tmp_path / "checkpoints"
    save_by_ranks(folder, 1)
    kill_at(boundary, folder, tmp_path / "hold", step=2, by_ranks=True)
    saved = checkpoint.newest(folder)
    assert saved is not None
    assert saved.step == (2 if boundary == PIECES_BOUNDARIES else 1)
    assert torch.equal(saved.tensors()["exp_avg"]["a.weight"].flatten(), TENSORS["exp_avg"]["a.weight"] + saved.step)
    save_by_ranks(folder, 3)
    assert names(folder) == [checkpoint.name_of(saved.step), "step-00000003"]


@pytest.mark.parametrize("victim", ["missing", "flipped", "of another save", "never told of"])
def test_a_rank_whose_piece_is_damaged_costs_the_checkpoint_and_no_other(tmp_path: Path, victim: str):
    save_by_ranks(tmp_path, 1)
    save_by_ranks(tmp_path, 2)
    path = tmp_path / "step-00000002" / RANK.format(1)
    if victim == "missing":
        path.unlink()
    elif victim == "flipped":
        data = bytearray(path.read_bytes())
        data[-2] ^= 8
        path.write_bytes(data)
    elif victim == "never told of":
        state = path.with_name(STATE)
        told = json.loads(state.read_text())
        del told["sha256"][path.name]
        state.write_text(json.dumps(checkpoint.sealed(told)))
    else:
        path.write_bytes((tmp_path / "step-00000001" / RANK.format(1)).read_bytes())
    said: list[str] = []
    found = checkpoint.newest(tmp_path, said.append)
    assert found is not None and found.step == 1 and "step-00000002 is damaged" in said[0]


def test_pieces_that_do_not_make_a_whole_are_not_read_as_one(tmp_path: Path):
    temporary = checkpoint.begin(tmp_path, 1)
    assert temporary is not None
    checkpoint.save_pieces(temporary, 0, pieces_of(0, 1))
    with pytest.raises(FileNotFoundError, match="rank-00001"):
        checkpoint.commit(temporary, 1, {"probe": 0.0, "ranks": RANKS}, KEEP)
    assert checkpoint.newest(tmp_path) is None
    found = open_tensors(temporary, [RANK.format(0)])["weight"]
    with pytest.raises(ValueError, match=r"2 of 8 elements of b.norm are in its files"):
        _ = found["b.norm"]


@pytest.mark.parametrize("victim", ["weight.safetensors", "exp_avg.safetensors", "state.json", "missing", "cut"])
def test_the_one_before_a_damaged_one_is_taken_and_the_user_told(
    tmp_path: Path, victim: str, capsys: pytest.CaptureFixture[str]
):
    save(tmp_path, 1)
    save(tmp_path, 2)
    newest = tmp_path / "step-00000002"
    if victim == "missing":
        (newest / "weight.safetensors").unlink()
    elif victim == "cut":
        (newest / "state.json").write_text("{")
    else:
        data = bytearray((newest / victim).read_bytes())
        data[-20] ^= 4
        (newest / victim).write_bytes(data)
    saved = checkpoint.newest(tmp_path)
    assert saved is not None and saved.step == 1
    said = capsys.readouterr().err
    assert "step-00000002 is damaged" in said and "damaged-step-00000002" in said
    assert names(tmp_path) == ["damaged-step-00000002", "step-00000001"]
    save(tmp_path, 2)
    again = checkpoint.newest(tmp_path)
    assert again is not None and again.step == 2


@pytest.mark.parametrize("victim", ["exp_avg.safetensors", "state.json"])
def test_neither_the_best_nor_the_one_to_go_back_to_is_a_damaged_one(tmp_path: Path, victim: str):
    scored = {10: 3.0, 20: 1.0, 30: 2.0, 40: float("nan"), 50: None}
    for step, score in scored.items():
        save(tmp_path, step, Policy(keep=9), score=score)
    assert checkpoint.scores(tmp_path) == {**scored, 40: None}
    data = bytearray((tmp_path / "step-00000020" / victim).read_bytes())
    (tmp_path / "step-00000020" / victim).write_bytes(b"[]" if victim == STATE else data[:-1] + b"~")
    said: list[str] = []
    found = checkpoint.best(tmp_path, said.append)
    assert found is not None and found.step == 30
    found = checkpoint.newest(tmp_path, said.append, at_most=20)
    assert found is not None and found.step == 10
    assert len(said) == 1 and "step-00000020 is damaged" in said[0]


def test_a_checkpoint_that_is_there_is_not_written_again(tmp_path: Path):
    save(tmp_path, 5)
    before = (tmp_path / "step-00000005" / "state.json").stat().st_mtime_ns
    save(tmp_path, 5)
    assert (tmp_path / "step-00000005" / "state.json").stat().st_mtime_ns == before


STATE_OF_ALL_KINDS: dict[str, Any] = {
    "scalars": {"taken": 256, "nested": {"beta": 0.9}}, "data": {"pack": "none"}, "guard": {"bad": [2], "mean": None},
    "probe": float("nan"), "score": 1.5, "word": "ä",
}  # fmt: skip


def test_no_byte_of_what_a_checkpoint_says_can_change_unseen(tmp_path: Path):
    """Every bit of every byte; one that was unseen skipped data."""
    save(tmp_path, 1)
    save(tmp_path, 256, **STATE_OF_ALL_KINDS)
    path = tmp_path / "step-00000256" / STATE
    sound = path.read_bytes()
    kept = checkpoint.intact(tmp_path, 256)
    assert kept is not None and kept.step == 256 and kept.state["scalars"] == STATE_OF_ALL_KINDS["scalars"]
    said: list[str] = []
    for at in range(len(sound)):
        for bit in range(8):
            path.write_bytes(sound[:at] + bytes([sound[at] ^ 1 << bit]) + sound[at + 1 :])
            assert checkpoint.intact(tmp_path, 256, said.append) is None, (at, bit)
            (tmp_path / "damaged-step-00000256").rename(path.parent)
    assert len(said) == 8 * len(sound)
    assert checkpoint.scores(tmp_path)[256] is None  # of a damaged one, no score decides what stays
    path.write_bytes(sound)
    assert checkpoint.scores(tmp_path)[256] == 1.5


@pytest.mark.parametrize("says", [2, 3, "2", None])
def test_a_checkpoint_without_a_hash_of_its_state_is_taken_when_it_is_of_its_step(tmp_path: Path, says: Any):
    """As earlier versions wrote them."""
    save(tmp_path, 1)
    save(tmp_path, 2)
    path = tmp_path / "step-00000002" / STATE
    state = json.loads(path.read_text())
    state["sha256"].pop(STATE, None)
    path.write_text(json.dumps({**state, "step": says}))
    said: list[str] = []
    found = checkpoint.newest(tmp_path, said.append)
    assert found is not None and found.step == (2 if says == 2 else 1)
    assert (f"state.json is of step {says}" in said[0]) if said else says == 2


def test_a_checkpoint_under_the_name_of_another_step_is_not_taken(tmp_path: Path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    (tmp_path / "step-00000002").rename(tmp_path / "step-00000003")
    said: list[str] = []
    found = checkpoint.newest(tmp_path, said.append)
    assert found is not None and found.step == 1 and "state.json is of step 2" in said[0]


@pytest.mark.slow  # 25 s
def test_steps_go_on_while_a_slow_disk_takes_a_checkpoint(keypad_shards: Artifact, tmp_path: Path):
    """Every fsync takes a fifth of a second more, in all processes; a save makes a dozen of them."""
    if not shutil.which("strace"):
        pytest.skip("strace is not here (Debian and Ubuntu: apt-get install strace)")
    config = {**SMALL, "steps": 24, "save_every": 8, "keep": 9}
    out, seen = tmp_path / "model", tmp_path / "calls"
    watched = ["strace", "-f", "--seccomp-bpf", "-ttt", "-y", "-qq", "-o", str(seen), "-e", "trace=fsync"]
    slowly = [*watched, "-e", "inject=fsync:delay_enter=200000", sys.executable, "-m", "tests.train.driver"]
    done = subprocess.run(
        [*slowly, str(keypad_shards.path), str(out), "2", json.dumps(config)], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT, timeout=240,
    )  # fmt: skip
    if "strace:" in done.stderr and not out.exists():
        pytest.skip(f"strace cannot work here ({done.stderr.strip()})")
    assert done.returncode == 0, done.stderr
    calls = [(float(line.split()[1]), line) for line in seen.read_text().splitlines() if "DELAYED" in line]
    times = {step: [at for at, line in calls if f"/.step-{step:08d}." in line] for step in (8, 16, 24)}
    assert all(len(each) >= 9 and each[-1] - each[0] > 1.5 for each in times.values())
    rows = {
        row["step"]: row["time"] / 1000 for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    }
    for step in (8, 16):
        meanwhile = {s for s, at in rows.items() if times[step][0] < at < times[step][-1]}
        assert set(range(step + 1, step + 5)) <= meanwhile <= set(range(step + 1, step + 9)), (step, meanwhile)
        assert times[step][-1] < times[step + 8][0]  # one save at a time
    saved = checkpoint.newest(out / "checkpoints")
    assert saved is not None and saved.step == 24 and checkpoint.steps(out / "checkpoints") == {8, 16, 24}
