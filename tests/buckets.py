"""A server that speaks S3, and a proxy before it that fails at any request."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from typing import Literal

Fault = Literal["error", "cut request", "cut reply", "slow", "slow down", "expired"]

_REFUSALS: dict[str, tuple[str, str]] = {
    "error": ("500 Internal Server Error", ""),
    "slow down": ("503 Slow Down", "SlowDown"),
    "expired": ("400 Bad Request", "ExpiredToken"),
}
"""The status, and the code that S3 gives with it."""

_HEADERS_END = b"\r\n\r\n"


class Proxy:
    """Hands each request on, but does `fault` to the one numbered `at`, from 1, or if lasting also to all later ones.

    error: 500 instead of asking the server; slow down: 503; expired: as with credentials that have expired.
    cut request: the connection breaks before the server has heard of it. cut reply: the server has done it, the client
    gets half of what it says. slow: later.
    """

    def __init__(self, port: int) -> None:
        """port: the server's."""
        self._server = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self.rest()
        self._accepting = threading.Thread(target=self._accept)
        self._accepting.start()

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    def rest(self) -> None:
        """No more faults; requests are counted from 1 again."""
        self.at, self.fault, self.lasting, self.requests = 0, "error", False, 0

    def fail(self, at: int, fault: Fault, *, lasting: bool = False) -> None:
        self.rest()
        self.at, self.fault, self.lasting = at, fault, lasting

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join()
        self._listener.close()
        with self._lock:
            for connection in self._open:
                with_shutdown(connection)
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            with self._lock:
                self._open.add(client)
            thread = threading.Thread(target=self._serve, args=(client,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, client: socket.socket) -> None:
        with closing(client):
            try:
                while (request := read_message(client, client)) and self._answer(client, request):
                    pass
            except OSError:  # the client has gone
                pass
            with self._lock:
                self._open.discard(client)

    def _answer(self, client: socket.socket, request: bytes) -> bool:
        """Whether the connection lives on."""
        with self._lock:
            self.requests += 1
            due = self.requests == self.at or (self.lasting and 0 < self.at < self.requests)
            fault = self.fault if due else None
        if fault == "slow":
            time.sleep(0.02)
        if fault in _REFUSALS:
            client.sendall(_refusal(*_REFUSALS[fault]))
            return False
        if fault == "cut request":
            # Not half of it to the server: this one, unlike S3, would make an object of half a body.
            return False
        with socket.create_connection(("127.0.0.1", self._server)) as server:
            server.sendall(request)
            reply = read_message(server, None, bodiless=request.startswith(b"HEAD "))
        client.sendall(reply[: len(reply) // 2] if fault == "cut reply" else reply)
        return fault != "cut reply"


def _refusal(status: str, code: str) -> bytes:
    body = f"<Error><Code>{code}</Code><Message>not now</Message></Error>".encode() if code else b""
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\nConnection: close"
    return head.encode() + _HEADERS_END + body


def with_shutdown(connection: socket.socket) -> None:
    with suppress(OSError):  # its other end was faster
        connection.shutdown(socket.SHUT_RDWR)


def read_message(source: socket.socket, asker: socket.socket | None, *, bodiless: bool = False) -> bytes:
    """One request or reply; empty if there is none any more. asker: who waits to be told to go on."""
    data = b""
    while _HEADERS_END not in data:
        if not (more := source.recv(1 << 16)):
            return b""
        data += more
    headers, _, body = data.partition(_HEADERS_END)
    fields = dict(line.split(b": ", 1) for line in headers.lower().split(b"\r\n")[1:])
    if asker and fields.get(b"expect") == b"100-continue":
        asker.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        headers = b"\r\n".join(line for line in headers.split(b"\r\n") if not line.lower().startswith(b"expect:"))
    parts = [body]
    if fields.get(b"transfer-encoding") == b"chunked":
        while not b"".join(parts[-2:]).endswith(b"0\r\n\r\n"):
            parts.append(source.recv(1 << 16))
    elif not bodiless:
        missing = int(fields.get(b"content-length", b"0")) - len(body)
        while missing > 0:
            if not (more := source.recv(1 << 16)):
                break
            parts.append(more)
            missing -= len(more)
    return headers + _HEADERS_END + b"".join(parts)


@contextmanager
def s3() -> Iterator[tuple[int, Proxy]]:
    """(the server's own port, the proxy before it)"""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        port = server.get_host_and_port()[1]
        with closing(Proxy(port)) as proxy:
            yield port, proxy
    finally:
        server.stop()
