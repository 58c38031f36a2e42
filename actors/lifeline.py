"""Connections that say one thing only: when the kernel closes one, the process behind it has ended.

Ranks and keepers open one to the controller. Nothing is sent but who they are and the run's secret.
A closed connection is seen within a millisecond, also when a whole host's processes die at once and
nobody is left to report it. It can also mean a broken network, so it is evidence, not a verdict.
"""

from __future__ import annotations

import contextlib
import hmac
import socket
import threading
from collections.abc import Callable

HELLO_LIMIT_BYTES = 512
HELLO_LIMIT_S = 10.0


class Lifelines:
    """The controller's end: accepts, and calls `lost(name)` when a connection has been closed."""

    def __init__(self, ip: str, secret: str, lost: Callable[[str], None]) -> None:
        self._secret = secret
        self._lost = lost
        self._server = socket.create_server((ip, 0), backlog=1024)
        self.address: tuple[str, int] = self._server.getsockname()[:2]
        threading.Thread(target=self._accept, name="lifelines", daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:  # closed: the controller ends
                return
            threading.Thread(target=self._hold, args=(connection,), name="lifeline", daemon=True).start()

    def _hold(self, connection: socket.socket) -> None:
        with connection:
            connection.settimeout(HELLO_LIMIT_S)
            try:
                hello = connection.recv(HELLO_LIMIT_BYTES).decode(errors="replace")
                secret, _, name = hello.partition(" ")
                if not name or not hmac.compare_digest(secret.encode(), self._secret.encode()):
                    return
                connection.settimeout(None)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                while connection.recv(1):
                    pass
            except OSError:  # a reset says the same as an end
                pass
            self._lost(name)

    def close(self) -> None:
        self._server.close()


class Lifeline:
    """The process's end, opened anew whenever a controller names a new address."""

    def __init__(self, name: str, secret: str) -> None:
        self._hello = f"{secret} {name}".encode()
        self._address: tuple[str, int] | None = None
        self._connection: socket.socket | None = None

    def hold(self, address: tuple[str, int]) -> bool:
        """Connect there, unless it is connected already; whether this is another controller than before."""
        if address == self._address:
            return False
        former, self._address = self._connection, None
        with contextlib.suppress(OSError):  # the controller has gone again; it will name a new address
            self._connection = socket.create_connection(address, timeout=HELLO_LIMIT_S)
            self._connection.sendall(self._hello)
            self._address = address
        if former is not None:
            former.close()
        return former is not None
