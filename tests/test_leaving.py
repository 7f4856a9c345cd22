"""How commands end, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import atexit, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from mmlm.leaving import run

class Taken:
    def __del__(self):
        print("taken apart", flush=True)

kept, pool = Taken(), ThreadPoolExecutor(2)
atexit.register(print, "exit function")
pool.submit(lambda: (time.sleep(0.3), print("pool")))
threading.Thread(target=lambda: (time.sleep(0.7), print("thread"))).start()
threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
print("not flushed")

def main():
    {body}

run(main)
"""


BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


def script(body: str) -> list[str]:
    return [sys.executable, "-c", SCRIPT.replace("{body}", body)]


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("return 0", 0, ""),
        ("return None", 0, ""),
        ("return 4", 4, ""),
        ("sys.exit(2)", 2, ""),
        ("sys.exit('no such verb')", 1, "no such verb"),
        ("raise ValueError('ours')", 1, "ValueError: ours"),
        ("raise KeyboardInterrupt", 4, "interrupted; run the same command again"),
    ],
)
def test_what_is_to_be_done_is_done_and_the_interpreter_is_left_alone(body: str, code: int, said: str) -> None:
    done = subprocess.run(script(body), capture_output=True, text=True, timeout=60, env=BUFFERED)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert done.stdout.split("\n") == ["not flushed", "pool", "thread", "exit function", ""]


def test_a_reader_that_went_away_is_no_error() -> None:
    process = subprocess.Popen(script("return 0"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=BUFFERED)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait(60) == 0, said
    assert said == b""


def test_the_command_ends_so() -> None:
    done = subprocess.run([sys.executable, "-m", "mmlm.cli", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.strip()
    done = subprocess.run([sys.executable, "-m", "mmlm.cli", "verify", "/nonexistent"], capture_output=True, text=True)
    assert done.returncode == 2 and "mmlm: " in done.stderr
