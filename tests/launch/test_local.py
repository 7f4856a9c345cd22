"""Local ranks: their environment, their errors, their stops, their deaths."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mmlm.errors import ArtifactError, Interrupted, LaunchError, WorkLost
from mmlm.launch import local

TARGETS = "tests.launch.targets"


def test_ranks_have_their_environment_from_exec(tmp_path: Path) -> None:
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS", "RAY_USAGE_STATS_ENABLED"]
    local.ranks(2)(f"{TARGETS}:note_environment", {"folder": str(tmp_path), "names": names}, log=tmp_path / "log")
    zero, one = ((tmp_path / f"rank-{r}.txt").read_text().split("\n") for r in (0, 1))
    assert zero[:4] == ["RANK=0", "LOCAL_RANK=0", "WORLD_SIZE=2", "MASTER_ADDR=127.0.0.1"]
    assert one[:3] == ["RANK=1", "LOCAL_RANK=1", "WORLD_SIZE=2"]
    assert int(zero[4].partition("=")[2]) >= 1
    assert zero[5] == "RAY_USAGE_STATS_ENABLED=0"


def test_two_ranks_talk_over_gloo(tmp_path: Path) -> None:
    local.ranks(2)(f"{TARGETS}:sum_of_ranks", {"folder": str(tmp_path)}, log=tmp_path / "log")
    assert [(tmp_path / f"sum-{r}.txt").read_text() for r in (0, 1)] == ["3.0", "3.0"]


def test_an_error_of_a_rank_comes_back_as_itself_and_ends_the_others(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(ArtifactError) as caught:
        local.ranks(2)(f"{TARGETS}:refuse", {"rank": 1}, log=tmp_path)
    assert (caught.value.found, caught.value.wanted, caught.value.cure) == ("found this", "that", "do so")
    assert time.monotonic() - start < 30


def test_an_error_class_with_its_own_constructor_keeps_its_words(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="/somewhere holds aaaaaaaaaaaa"):
        local.ranks(1)(f"{TARGETS}:conflict", {}, log=tmp_path)


def test_a_crash_is_our_fault_and_is_told_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="the words of the crash") as caught:
        local.ranks(1)(f"{TARGETS}:crash", {}, log=tmp_path)
    assert caught.value.exit_code == 1
    assert "Traceback" not in str(caught.value)
    assert "Traceback" in (tmp_path / "rank-0.log").read_text()


def test_a_killed_rank_is_named(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="rank 1 was killed") as caught:
        local.ranks(2)(f"{TARGETS}:kill_self", {"rank": 1}, log=tmp_path)
    assert caught.value.exit_code == 4  # the same command goes on


def test_a_loss_that_a_rank_tells_of_is_no_stop(tmp_path: Path) -> None:
    with pytest.raises(WorkLost, match="a worker ended; again"):
        local.ranks(2)(f"{TARGETS}:lose", {"rank": 1}, log=tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_stop_is_forwarded_as_it_came_and_all_ranks_save(tmp_path: Path, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    arguments = {"folder": str(tmp_path), "stop": True, "number": number.value}
    with pytest.raises(Interrupted, match="saved at step 7") as caught:
        local.ranks(2)(f"{TARGETS}:save_on_stop", arguments, log=tmp_path / "log")
    assert caught.value.exit_code == 4
    assert [(tmp_path / f"saved-{rank}").read_text() for rank in (0, 1)] == [number.name] * 2
    assert signal.getsignal(number) is before


def test_a_stop_says_whether_there_is_a_checkpoint(tmp_path: Path) -> None:
    for said in ("it begins anew: there was no checkpoint yet", "it continues from the last checkpoint"):
        with pytest.raises(Interrupted, match=f"training was stopped.*; run the same command again, {said}"):
            local.ranks(1)(f"{TARGETS}:stop_before_training", {}, log=tmp_path / "logs")
        (tmp_path / "checkpoints" / "step-000004").mkdir(parents=True, exist_ok=True)


def test_a_save_may_take_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "SAVE_SECONDS", 1.5)
    arguments = {"folder": str(tmp_path), "stop": True, "seconds": 3.0}
    with pytest.raises(Interrupted, match="saved at step 7"):
        local.ranks(2)(f"{TARGETS}:save_on_stop", arguments, log=tmp_path / "log")
    assert (tmp_path / "saved-0").exists() and (tmp_path / "saved-1").exists()


def test_ranks_die_with_a_killed_parent(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path\nfrom mmlm.launch import local\n"
        f"out = {str(tmp_path)!r}\nlocal.ranks(2)('{TARGETS}:save_on_stop', {{'folder': out}}, log=Path(out, 'log'))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    ups = [tmp_path / "up-0", tmp_path / "up-1"]
    _wait(lambda: all(up.exists() and up.read_text() for up in ups))
    parent.kill()
    parent.wait()
    _wait(lambda: not any(_alive(int(up.read_text())) for up in ups))


def test_progress_reaches_the_terminal_and_talk_the_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    local.ranks(1)(f"{TARGETS}:progress", {"total": 5}, log=tmp_path)
    shown = capfd.readouterr().err
    assert "5 of 5 steps" in shown
    assert "talk for the log" not in shown
    assert "talk for the log" in (tmp_path / "rank-0.log").read_text()


def test_zero_ranks_are_refused() -> None:
    with pytest.raises(LaunchError, match="at least 1"):
        local.ranks(0)


def test_torchrun_leads_and_follows(tmp_path: Path) -> None:
    """Rank 0 runs the verb, the others only what it launches; without torchrun there is just the verb."""
    agent = torchrun(tmp_path, "sum_of_ranks")
    said = agent.communicate(timeout=120)[1]
    assert agent.returncode == 0, said[-2000:]
    assert sorted(p.name for p in tmp_path.glob("verb-*")) == ["verb-0"]
    assert [(tmp_path / f"sum-{r}.txt").read_text() for r in (0, 1)] == ["3.0", "3.0"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_rank_that_is_alone_is_stopped_in_good_order(number: signal.Signals) -> None:
    """Outside training, too: its run is to be ended, and the handlers are put back."""
    code = (
        "import signal, sys, time\nfrom mmlm.launch.leader import lead\n"
        "def work():\n"
        "    try:\n        print('up', flush=True)\n        time.sleep(60)\n    except KeyboardInterrupt:\n        return 4\n"
        "code = lead(work)\n"
        "print([signal.getsignal(n) == signal.SIG_DFL for n in (signal.SIGTERM, signal.SIGUSR1)])\n"
        "sys.exit(code)"
    )
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    rank = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
    assert rank.stdout is not None and rank.stdout.readline() == "up\n"
    rank.send_signal(number)
    assert rank.communicate(timeout=30)[0] == "[True, True]\n"
    assert rank.returncode == Interrupted.exit_code


@pytest.mark.parametrize("count", [1, 2])
def test_ranks_of_torchrun_die_with_it(tmp_path: Path, count: int) -> None:
    """A killed agent forwards nothing; ranks that lived on would hold their GPUs and write into the folder."""
    agent = torchrun(tmp_path, "save_on_stop", count)
    ups = [tmp_path / f"up-{rank}" for rank in range(count)]
    _wait(lambda: all(up.exists() and up.read_text() for up in ups), 60)
    pids = [int(up.read_text()) for up in ups]
    try:
        assert all(_alive(pid) for pid in pids)
        agent.kill()
        agent.communicate(timeout=30)
        _wait(lambda: not any(_alive(pid) for pid in pids), 5)
    finally:
        for pid in filter(_alive, pids):
            os.kill(pid, signal.SIGKILL)
    assert not list(tmp_path.glob("saved-*"))


def test_torchrun_forwards_a_notice_if_told_to(tmp_path: Path) -> None:
    """As docs/guide.md says; a SIGUSR1 that torchrun does not know of would end it, and with it the ranks."""
    agent = torchrun(tmp_path, "save_on_stop", 2, "--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
    ups = [tmp_path / "up-0", tmp_path / "up-1"]
    _wait(lambda: all(up.exists() and up.read_text() for up in ups), 60)
    agent.send_signal(signal.SIGUSR1)
    agent.communicate(timeout=60)
    assert (tmp_path / "saved-0").exists() and (tmp_path / "saved-1").exists()


@pytest.mark.parametrize(("asked", "size"), [(None, 2), (2, 2), (4, 0)])
def test_ranks_that_torchrun_did_not_start_are_refused(
    asked: int | None, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    if size:
        assert local.choose(asked).ranks == size
        return
    with pytest.raises(LaunchError, match=r"--ranks 4 in one of 2 ranks .*; wanted none, or --ranks 2"):
        local.choose(asked)


def torchrun(folder: Path, target: str, count: int = 2, *flags: str) -> subprocess.Popen[str]:
    """A verb of one launch, of `target` of TARGETS on `folder`, under torchrun with `count` ranks."""
    script = folder / "job.py"
    script.write_text(
        "import os, sys\nfrom pathlib import Path\n"
        "from mmlm.launch import local\nfrom mmlm.launch.leader import lead\n"
        "def work():\n"
        f"    out = Path({str(folder)!r}); (out / ('verb-' + os.environ.get('RANK', 'alone'))).touch()\n"
        f"    local.choose()('{TARGETS}:{target}', {{'folder': str(out)}}, log=out / 'log')\n"
        "    return 0\n"
        "if __name__ == '__main__': sys.exit(lead(work))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), *flags, "--", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _wait(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1][:3]
    except OSError:
        return False
