"""An HTTP proxy before a test's S3 server that fails as networks and S3 do: real sockets, real resets, real stalls."""

import contextlib
import http.client
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

Fault = Literal[
    "slow down",
    "internal error",
    "conflict",
    "reset before",
    "reset after",
    "short body",
    "stall before",
    "stall after",
    "applied late",
    "expired 400",
    "expired 403",
]
FAULTS: tuple[Fault, ...] = get_args(Fault)
LASTING: tuple[Fault, ...] = ("expired 400", "expired 403")
PASSING: tuple[Fault, ...] = tuple(fault for fault in FAULTS if fault not in LASTING)

_ANSWERS: dict[Fault, tuple[int, str, str]] = {
    "slow down": (503, "SlowDown", "Please reduce your request rate."),
    "internal error": (500, "InternalError", "We encountered an internal error. Please try again."),
    "conflict": (409, "ConditionalRequestConflict", "A conflicting operation occurred during this request."),
    "expired 400": (400, "ExpiredToken", "The provided token has expired."),
    "expired 403": (403, "ExpiredToken", "The provided token has expired."),
}
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "expect", "content-length", "server", "date"}

Choose = Callable[[str], Fault | None]
"""Called with the method of each request, `conditional PUT` being one of them; names the fault it meets, or None."""


class FaultyProxy(ThreadingHTTPServer):
    """Passes requests on to `upstream` except where `choose` says otherwise.

    Attributes:
        choose: may be replaced at any time.
        log: method and fault of every fault injected so far.
        late_seconds: how long a request that is applied late is held; longer than the client's read timeout.
        released: ends what is held; set when the proxy is closed.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = urlsplit(upstream).netloc
        self.choose: Choose = lambda _method: None
        self.log: list[tuple[str, Fault]] = []
        self.num_requests = 0
        self.released = threading.Event()
        self.late_seconds = 1.0
        self._lock = threading.Lock()

    @property
    def endpoint(self) -> str:
        """URL for clients."""
        return f"http://127.0.0.1:{self.server_port}"

    def next_fault(self, method: str) -> Fault | None:
        """What becomes of the next request, logged."""
        with self._lock:
            self.num_requests += 1
            fault = self.choose(method)
            if fault is not None:
                self.log.append((method, fault))
            return fault

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that gave up are what this proxy is for."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: FaultyProxy

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        is_conditional = any(name in self.headers for name in ("If-Match", "If-None-Match"))
        fault = self.server.next_fault("conditional PUT" if is_conditional else self.command)
        if fault in _ANSWERS:
            status, code, message = _ANSWERS[fault]
            error = (
                f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'
            )
            self._answer(status, {"Content-Type": "application/xml"}, error.encode())
        elif fault == "reset before":
            self._reset()
        elif fault == "stall before":
            self._stall()
        elif fault == "applied late":
            self.server.released.wait(self.server.late_seconds)
            self._pass_on(body, "reset after")
        else:
            self._pass_on(body, fault)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _handle  # noqa: N815

    def _pass_on(self, body: bytes, fault: Fault | None) -> None:
        upstream = http.client.HTTPConnection(self.server.upstream, timeout=30)
        try:
            headers = {key: value for key, value in self.headers.items() if key.lower() not in ("expect", "connection")}
            upstream.request(self.command, self.path, body, headers)
            response = upstream.getresponse()
            data = response.read()
        finally:
            upstream.close()
        if fault == "stall after":
            self._stall()
        elif fault == "short body" and len(data) > 1:
            self._answer(response.status, dict(response.getheaders()), data, data[: len(data) // 2])
            self._reset(gently=True)
        elif fault is not None:  # a reset after, or a body that is too small to cut
            self._reset()
        else:
            self._answer(response.status, dict(response.getheaders()), data)

    def _answer(self, status: int, headers: dict[str, str], data: bytes, sent: bytes | None = None) -> None:
        self.send_response(status)
        length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(data))
        for key, value in headers.items():
            if key.lower() not in _HOP_BY_HOP:
                self.send_header(key, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data if sent is None else sent)

    def _stall(self) -> None:
        self.server.released.wait(30)
        self._reset()

    def _reset(self, gently: bool = False) -> None:
        """End the connection; without `gently` by RST, as a crashed peer or a firewall does."""
        self.close_connection = True
        if not gently:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()


@contextlib.contextmanager
def faulty_proxy(upstream: str) -> Iterator[FaultyProxy]:
    """A running proxy before an S3 server."""
    proxy = FaultyProxy(upstream)
    thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.released.set()
        proxy.shutdown()
        proxy.server_close()
        thread.join()
