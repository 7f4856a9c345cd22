"""The server over loopback: good questions, bad requests, its end."""

from __future__ import annotations

import base64
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mmlm.errors import ServeError
from mmlm.publish import serve as serving
from mmlm.publish.answering import Responder

if TYPE_CHECKING:
    from tests.publish.conftest import World

JSON = {"Content-Type": "application/json"}


def start(model: Path, port: int) -> subprocess.Popen[bytes]:
    code = "import sys; from mmlm.publish.serve import serve; serve(sys.argv[1], port=int(sys.argv[2]))"
    return subprocess.Popen([sys.executable, "-c", code, str(model), str(port)])


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture(scope="module")
def server(world: World) -> Iterator[str]:
    port = free_port()
    process = start(world.checkpoint(0).path, port)
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 60
    while call(url + "/health")[0] != 200:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    yield url
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0, "SIGTERM ends it well"


def call(url: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
    request = urllib.request.Request(url, body, JSON if headers is None else headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            status, data = reply.status, reply.read()
    except urllib.error.HTTPError as error:
        status, data = error.code, error.read()
    except OSError:
        return 0, None
    try:
        return status, json.loads(data)
    except ValueError:
        return status, data.decode()


def test_it_answers_like_the_checkpoint(server: str, world: World) -> None:
    picture, sound = (world.data / "4.png").read_bytes(), (world.data / "4.wav").read_bytes()
    expected = Responder.load(world.checkpoint(0).path).answer(
        [{"text": "Which number is it?", "image": picture, "audio": sound}]
    )
    coded = {
        "image": base64.b64encode(picture).decode(),
        "audio": "data:audio/wav;base64," + base64.b64encode(sound).decode(),
    }
    status, answer = call(server + "/predict", json.dumps({"text": "Which number is it?", **coded}).encode())
    assert (status, answer) == (200, expected[0])
    assert call(server + "/predict", json.dumps({"text": "?", "image": None}).encode())[0] == 200


def test_what_it_says_about_itself(server: str) -> None:
    status, facts = call(server + "/health")
    assert status == 200
    assert facts["status"] == "ok"
    assert facts["takes"] == ["text", "image", "audio"]
    assert facts["tasks"][0]["questions"][0] == "Which number is it?"
    status, page = call(server + "/")
    assert status == 200
    assert "http://" not in page, "the page needs nothing from elsewhere"
    assert "https://" not in page


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"{", 400, "not JSON"),
        (b"\xff\xfe", 400, "not JSON"),
        (b"[" * 100_000, 400, "not JSON"),
        (b"[]", 422, "one object"),
        (b'{"txt": 1}', 422, "`txt`"),
        (b'{"text": 1}', 422, "`text` must be a text"),
        (b"{}", 422, "nothing is asked"),
        (b'{"text": "?", "image": "/etc/hostname"}', 422, "base64"),
        (b'{"text": "?", "image": "file:///etc/hostname"}', 422, "base64"),
        (b'{"text": "?", "image": "bm8gcGljdHVyZQ=="}', 422, ""),
        (b'{"text": "?", "audio": "bm8gc291bmQ="}', 422, ""),
        (b'{"text": "?", "audio": {"a": "b"}}', 422, "base64 text, or a list of such, not dict"),
        (b'{"text": "?", "audio": [["a"]]}', 422, "base64 text, or a list of such, not list"),
        (b'{"text": "?", "audio": ["bm8gc291bmQ=", "a"]}', 422, "the sound 2 of 2 is not base64"),
        (json.dumps({"text": "x" * 10_000}).encode(), 422, "tokens"),
    ],
)
def test_bad_requests(server: str, body: bytes, status: int, words: str) -> None:
    found, reply = call(server + "/predict", body)
    assert found == status
    assert words in reply["error"]
    assert "Traceback" not in reply["error"]
    assert call(server + "/health")[0] == 200


def test_a_body_that_is_too_large_is_not_read(server: str) -> None:
    host, port = server.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as wire:
        head = (
            f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {10**10}\r\n\r\n"
        )
        wire.sendall(head.encode())
        assert b"413" in wire.recv(100)


def test_other_types_and_places(server: str) -> None:
    assert call(server + "/predict", b"{}", {"Content-Type": "text/plain"})[0] == 415
    assert call(server + "/predict")[0] == 405
    assert call(server + "/etc/passwd")[0] == 404
    assert call(server + "/docs")[0] == 404


def test_a_taken_port_is_told_before_the_model_is_loaded(server: str) -> None:
    port = int(server.rpartition(":")[2])
    with pytest.raises(ServeError, match=str(port)):
        serving.serve("/no/such/model", port=port)
    with pytest.raises(ServeError, match="99999"):
        serving.serve("/no/such/model", port=99999)


def test_it_ends_while_it_loads(world: World) -> None:
    process = start(world.checkpoint(0).path, free_port())
    time.sleep(1.0)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) in (0, -signal.SIGTERM)
