"""Two hosts on this machine: network namespaces with an address each, joined by a cable (a veth pair)."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator

HEAD, SECOND = "10.213.7.1", "10.213.7.2"


class Hosts:
    """`head` and `second` are the names of the namespaces."""

    def __init__(self) -> None:
        tag = uuid.uuid4().hex[:6]
        self.head, self.second = f"mmlm-a-{tag}", f"mmlm-b-{tag}"
        self.plugs = (f"ma{tag}", f"mb{tag}")

    @classmethod
    @contextlib.contextmanager
    def joined(cls) -> Iterator[Hosts]:
        made = cls()
        try:
            for name in (made.head, made.second):
                _ip("netns", "add", name)
            one, other = made.plugs
            _ip("link", "add", one, "netns", made.head, "type", "veth", "peer", "name", other, "netns", made.second)
            for name, plug, address in ((made.head, one, HEAD), (made.second, other, SECOND)):
                _ip("-n", name, "addr", "add", f"{address}/24", "dev", plug)
                _ip("-n", name, "link", "set", plug, "up")
                _ip("-n", name, "link", "set", "lo", "up")
            yield made
        finally:
            for name in (made.head, made.second):
                subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def on(self, name: str, *command: str) -> list[str]:
        return ["ip", "netns", "exec", name, *command]

    def unplug(self) -> None:
        _ip("-n", self.head, "link", "set", self.plugs[0], "down")


def missing() -> str:
    """Why there can be no such hosts here; "" when there can."""
    if not shutil.which("ip"):
        return "no `ip` here (on Debian or Ubuntu: iproute2)"
    if os.geteuid():
        return "network namespaces need root"
    name = f"mmlm-try-{uuid.uuid4().hex[:6]}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return tried.stderr.strip()


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
