"""Servers on 127.0.0.1 for tests of remote reading: a file server and proxy with faults on request, and an S3 server."""

from __future__ import annotations

import http.client
import os
import re
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit
from urllib.request import Request as Upload
from urllib.request import urlopen

# What may go wrong with the answer to a GET; any HTTP status, such as "503", is one more kind.
FAULTS = {
    "drop": "Content-Length of the whole, and the connection is closed in the middle",
    "reset": "the connection is reset (RST) in the middle",
    "stall": "half of the answer, then nothing for as long as the client waits",
    "short": "half of the answer, and its length as Content-Length",
    "cut": "half of the answer, without Content-Length, then the connection is closed",
    "whole": "status 200 and the whole file, whatever range was asked for",
    "flip": "one byte in the middle is another one",
    "page": "status 200 and a page that asks to log in",
}
# What may go wrong with a POST, PUT or DELETE; it takes effect only if it is `lost`.
UPLOAD_FAULTS = {
    "drop": "the connection is closed after half of the request's body",
    "reset": "the connection is reset (RST) after half of the request's body",
    "stall": "half of the request's body is taken, then nothing for as long as the client waits",
    "page": FAULTS["page"],
    "lost": "the request takes effect, but the connection is closed without an answer; for a GET or HEAD, too",
}
_WHOLE_ANSWERS = ("page", "lost")  # kinds that an answer without a body can have too


@dataclass
class Fault:
    """What to do to requests of some paths, see `FAULTS` and `UPLOAD_FAULTS`."""

    kind: str
    method: str | None  # None: any
    path: str  # the end of the paths
    times: int | None  # None: always
    after: int  # number of requests that succeed first
    longer_than: int  # as are shorter answers, or shorter bodies of uploads
    headers: dict[str, str]  # sent along

    def hits(self, method: str, path: str, num_bytes: int) -> bool:
        if self.method not in (None, method) or not path.endswith(self.path) or self.times == 0:
            return False
        if num_bytes <= self.longer_than:
            return False
        if method == "GET" and num_bytes == 0 and not self.kind.isdecimal() and self.kind not in _WHOLE_ANSWERS:
            return False  # a redirect has no middle: the fault is meant for what it leads to
        if self.after:
            self.after -= 1
            return False
        if self.times is not None:
            self.times -= 1
        return True


class Request(NamedTuple):
    """A request that a server had."""

    method: str
    path: str
    query: str
    range: str | None
    authorization: str | None
    host: str = ""
    num_bytes: int = 0  # of its body, as far as it came


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


@dataclass
class FaultyServer:
    """Serves a folder, or all that another server has, and injects faults; start it with `with`.

    Args:
        folder: what to serve. Or
        upstream: `host:port` of the server to be a reverse proxy of.
        pause_s: after each KiB of an answer.
        port: where to listen; 0 for any that is free.

    Attributes:
        requests: what was asked for so far.
        before: called with each request before it takes effect, for what should happen just then.
    """

    folder: Path | None = None
    upstream: str | None = None
    pause_s: float = 0.0
    port: int = 0
    requests: list[Request] = field(default_factory=list)
    before: Callable[[Request], None] | None = None

    def __post_init__(self) -> None:
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self.stopping = threading.Event()

    def __enter__(self):
        handler = type("Handler", (_Handler,), {"faulty": self})
        self._server = _Server(("127.0.0.1", self.port), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()
        self._server.hang_up()
        self._thread.join()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._server.server_port}"

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    def fail(
        self,
        kind: str,
        path: str,
        *,
        method: str | None = "GET",
        times: int | None = 1,
        after: int = 0,
        longer_than: int = -1,
        headers: dict[str, str] | None = None,
    ) -> None:
        """Inject a fault into coming requests of a method, or of any (None), to paths that end so."""
        kinds = {"GET": (*FAULTS, "lost"), "HEAD": _WHOLE_ANSWERS, None: _WHOLE_ANSWERS}.get(method, UPLOAD_FAULTS)
        assert kind in kinds or kind.isdecimal()
        with self._lock:
            self._faults.append(Fault(kind, method, path, times, after, longer_than, headers or {}))

    def reset(self) -> None:
        """Serve without faults from now on, and forget the requests."""
        with self._lock:
            self._faults.clear()
            self.requests.clear()

    def asked(self, method: str, path: str = "") -> list[Request]:
        """Return the requests so far of a method and of paths that end so."""
        return [request for request in list(self.requests) if request.method == method and request.path.endswith(path)]

    def gets(self, path: str) -> list[Request]:
        """Return the GETs so far of paths that end so."""
        return self.asked("GET", path)

    def note(self, request: Request) -> None:
        with self._lock:
            self.requests.append(request)

    def fault(self, method: str, path: str, num_bytes: int) -> Fault | None:
        with self._lock:
            return next((fault for fault in self._faults if fault.hits(method, path, num_bytes)), None)

    def answer(self, method: str, target: str, headers: dict[str, str], body: bytes) -> Answer:
        """Return what a server without faults answers."""
        if self.upstream is not None:
            return _from_upstream(self.upstream, method, target, headers, body)
        assert self.folder is not None
        return _from_folder(self.folder, target, headers)


def _from_folder(folder: Path, target: str, headers: dict[str, str]) -> Answer:
    path = folder / unquote(urlsplit(target).path).lstrip("/")
    if ".." in path.parts or not path.is_file():
        return Answer(404, {"Content-Type": "text/plain"}, b"there is no such file")
    return in_range(path.read_bytes(), headers)


def in_range(data: bytes, headers: dict[str, str]) -> Answer:
    """Return the answer to a request for a file, or for a single range of it."""
    plain = {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", headers.get("range", ""))
    if match is None or match[0] == "bytes=-":
        return Answer(200, plain, data)
    first, last = (int(text) if text else None for text in match.groups())
    if first is None:
        assert last is not None
        first, last = max(len(data) - last, 0), None
    last = len(data) - 1 if last is None else min(last, len(data) - 1)
    if match[1] and match[2] and int(match[2]) < int(match[1]):
        return Answer(200, plain, data)  # RFC 9110: a range that makes no sense is ignored
    if first >= len(data):
        return Answer(416, {**plain, "Content-Range": f"bytes */{len(data)}"}, b"")
    return Answer(
        206, {**plain, "Content-Range": f"bytes {first}-{last}/{len(data)}"}, data[first : last + 1]
    )  # fmt: skip


def _from_upstream(address: str, method: str, target: str, headers: dict[str, str], body: bytes) -> Answer:
    connection = http.client.HTTPConnection(address, timeout=60)
    try:
        connection.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
        for name, value in headers.items():
            if name not in ("connection", "content-length", "transfer-encoding", "expect"):
                connection.putheader(name, value)
        connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        response = connection.getresponse()
        dropped = ("connection", "transfer-encoding", "content-length", "date", "server")
        kept = {name: value for name, value in response.getheaders() if name.lower() not in dropped}
        if method == "HEAD":
            kept["Content-Length"] = response.headers.get("Content-Length", "0")
        return Answer(response.status, kept, response.read())
    finally:
        connection.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a client that keeps its connection would hold the shutdown up
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(address, handler)
        self._connections: set[socket.socket] = set()

    def get_request(self) -> tuple[socket.socket, Any]:
        request, address = super().get_request()
        self._connections.add(request)
        return request, address

    def close_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().close_request(request)

    def hang_up(self) -> None:
        """Close what clients keep open, lest the next server on this port be asked through this one."""
        for connection in self._connections.copy():
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: clients that go away in the middle are what the tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    faulty: FaultyServer

    def do_GET(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        reading = self.command in ("GET", "HEAD")
        fault = None if reading else self._fault(int(headers.get("content-length", 0)))
        if fault is not None and fault.kind in ("drop", "reset", "stall"):
            self._take_half(headers, fault.kind)
            return
        body = b"".join(self._pieces(headers))
        request = self._note(headers, len(body))
        if fault is not None and fault.kind != "lost":
            self._refuse(fault)
            return
        if self.faulty.before is not None:
            self.faulty.before(request)
        answer = self.faulty.answer(self.command, self.path, headers, body)
        if reading:
            fault = self._fault(len(answer.body))
        self._answer(answer, fault, headers)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _fault(self, num_bytes: int) -> Fault | None:
        return self.faulty.fault(self.command, urlsplit(self.path).path, num_bytes)

    def _note(self, headers: dict[str, str], num_bytes: int) -> Request:
        url, named = urlsplit(self.path), (headers.get("range"), headers.get("authorization"), headers.get("host", ""))
        request = Request(self.command, url.path, url.query, *named, num_bytes)
        self.faulty.note(request)
        return request

    def _pieces(self, headers: dict[str, str], longest: int = 1 << 20) -> Iterator[bytes]:
        """Give the body of the request as it comes."""
        if headers.get("transfer-encoding", "").lower() == "chunked":
            while num_bytes := int(self.rfile.readline().partition(b";")[0] or b"0", 16):
                yield self.rfile.read(num_bytes)
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
            return
        left = int(headers.get("content-length", 0))
        while left and (piece := self.rfile.read(min(left, longest))):
            left -= len(piece)
            yield piece

    def _take_half(self, headers: dict[str, str], kind: str) -> None:
        half = max(int(headers.get("content-length", 0)) // 2, 1)
        self._note(headers, len(next(self._pieces(headers, half), b"")))
        self.close_connection = True
        if kind == "stall":
            self._wait_until_left()
        elif kind == "reset":
            self._reset()

    def _refuse(self, fault: Fault) -> None:
        if fault.kind.isdecimal():
            self._send(Answer(int(fault.kind), fault.headers, b""))
        else:
            self._send(Answer(200, {"Content-Type": "text/html"}, b"<html>Please log in</html>" * 9))

    def _answer(self, answer: Answer, fault: Fault | None, headers: dict[str, str]) -> None:
        if fault is None:
            self._send(answer)
        elif fault.kind == "lost":
            self.close_connection = True
        elif fault.kind.isdecimal() or fault.kind == "page":
            self._refuse(fault)
        elif fault.kind == "whole":
            self._send(self.faulty.answer("GET", self.path, {**headers, "range": ""}, b""))
        elif fault.kind == "flip":
            middle = len(answer.body) // 2
            flipped = bytes([answer.body[middle] ^ 1])
            self._send(
                Answer(answer.status, answer.headers, answer.body[:middle] + flipped + answer.body[middle + 1 :])
            )
        else:
            self._send_half(answer, fault.kind)

    def _send_half(self, answer: Answer, kind: str) -> None:
        half = answer.body[: len(answer.body) // 2]
        if kind == "short":
            self._send(Answer(answer.status, answer.headers, half))
            return
        self.close_connection = True
        if kind == "cut":
            self._send_head(answer, {"Connection": "close"})
        else:
            self._send_head(answer, {"Content-Length": str(len(answer.body))})
        self.wfile.write(half)
        if kind == "stall":
            self._wait_until_left()
        elif kind == "reset":
            self._reset()

    def _wait_until_left(self) -> None:
        while not self.faulty.stopping.wait(0.02):  # and until the client is gone
            if select.select([self.connection], [], [], 0.05)[0] and not self.connection.recv(1, socket.MSG_PEEK):
                return

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())  # at once: socketserver would first say goodbye

    def _send(self, answer: Answer) -> None:
        headers = answer.headers
        if self.command != "HEAD" or "Content-Length" not in headers:
            headers = {**headers, "Content-Length": str(len(answer.body))}
        self._send_head(answer, headers)
        if self.command == "HEAD":
            return
        if not self.faulty.pause_s:
            self.wfile.write(answer.body)
            return
        for start in range(0, len(answer.body), 1024):
            self.wfile.write(answer.body[start : start + 1024])
            time.sleep(self.faulty.pause_s)

    def _send_head(self, answer: Answer, more: dict[str, str]) -> None:
        self.send_response(answer.status)
        for name, value in {**answer.headers, **more}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


_MOTO = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()  # ends with the tests, however they end
server.stop()
"""


@contextmanager
def s3_server(folder: Path, bucket: str) -> Iterator[str]:
    """Run an S3 whose bucket holds the files of a folder, and give its `host:port`."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", _MOTO],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        address = f"127.0.0.1:{int(process.stdout.readline())}"
        _put(f"http://{address}/{bucket}", b"")
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            _put(f"http://{address}/{bucket}/{path.relative_to(folder).as_posix()}", path.read_bytes())
        yield address
    finally:
        process.stdin.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def _put(url: str, data: bytes) -> None:
    headers = {
        "Authorization": "AWS4-HMAC-SHA256 Credential=testing/20300101/us-east-1/s3/aws4_request",
        "Content-Type": "application/octet-stream",
    }
    with urlopen(Upload(url, data=data, method="PUT", headers=headers), timeout=60) as response:
        assert response.status == 200
