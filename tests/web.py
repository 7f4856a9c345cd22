"""A web server for tests that misbehaves when told to, and counts what it is asked."""

from __future__ import annotations

import hashlib
import ssl
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Site:
    """Files by path, and how to serve them."""

    files: dict[str, bytes] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    """What happens to the next GETs, one each: `503`, `429`, `cut:N` (the connection breaks after N bytes), `short:N`
    (N bytes and a clean end), `flip` (a bit is wrong); "" is a good answer."""
    ranges: bool = True
    etags: bool = True
    salt: bytes = b"salt"
    """What tells an ETag from a checksum; with none it is the MD5, as on S3."""
    head: bool = True
    md5: bool = False
    lie: int = 0
    """Added to the length that is told."""
    slow: float = 0.0
    """Seconds between pieces of 64 KiB."""
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    """(method, path, Range) of every request."""
    sent: Counter[str] = field(default_factory=Counter)
    """Bytes of bodies, by path."""
    url: str = ""

    def gets(self, path: str) -> list[str]:
        """The Range of every GET of `path`."""
        return [ranged for method, asked, ranged in self.asked if method == "GET" and asked == path]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    site: Site

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        site, path = self.site, self.path.partition("?")[0]
        ranged = self.headers.get("Range", "")
        site.asked.append((self.command, path, ranged))
        fault = site.faults.pop(0) if body and site.faults else ""
        if path not in site.files or (not body and not site.head) or fault.isdigit():
            status = int(fault) if fault else 404 if path not in site.files else 403
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = site.files[path]
        first, last = 0, len(data)
        if ranged and site.ranges:
            low, _, high = ranged.removeprefix("bytes=").partition("-")
            first, last = int(low), min(len(data), int(high) + 1 if high else len(data))
            if first >= len(data):
                self.send_response(416)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
        self.send_response(206 if (first, last) != (0, len(data)) or (ranged and site.ranges) else 200)
        if ranged and site.ranges:
            self.send_header("Content-Range", f"bytes {first}-{last - 1}/{len(data)}")
        piece = data[first:last]
        kind, _, count = fault.partition(":")
        if kind == "short":
            piece = piece[: int(count)]
        if kind == "flip":
            piece = bytes([piece[0] ^ 1]) + piece[1:]
        self.send_header("Content-Length", str(len(piece) + (site.lie if not ranged else 0)))
        if site.etags:
            self.send_header("ETag", f'"{hashlib.md5(data + site.salt).hexdigest()}"')
        if site.md5:
            import base64

            self.send_header("Content-MD5", base64.b64encode(hashlib.md5(data).digest()).decode())
        self.end_headers()
        if not body:
            return
        if kind == "cut":
            piece = piece[: int(count)]
        for at in range(0, len(piece), 1 << 16):
            self.wfile.write(piece[at : at + (1 << 16)])
            site.sent[path] += len(piece[at : at + (1 << 16)])
            if site.slow:
                self.wfile.flush()
                time.sleep(site.slow)
        if kind == "cut" or site.lie > 0:
            self.close_connection = True


@contextmanager
def serving(tls: ssl.SSLContext | None = None) -> Iterator[Site]:
    """A Site, served on loopback, by https with `tls`; `site.url` has no slash at its end."""
    site = Site()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"site": site}))
    server.daemon_threads = True
    if tls:
        server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    site.url = f"http{'s' if tls else ''}://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
