"""How two processes of a run prove to each other that they know its secret, before anything else is said.

    server: magic, nonce; client: nonce, proof; server: proof. Fixed sizes, one deadline for all.

The secret itself is never sent, nor does anything that is sent help a listener: each proof is an HMAC over both nonces.
Strangers cost a descriptor each and no thread. There are at most STRANGERS_LIMIT of them, each for GREETING_LIMIT_S;
beyond that the oldest from the address that has most is hung up on. Those that have been greeted are not counted.
"""

from __future__ import annotations

import contextlib
import hmac
import secrets
import selectors
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from .stream import NotAuthentic, PeerLost

GREETING_LIMIT_S = 2.0
STRANGERS_LIMIT = 256
_ACCEPT_AGAIN_S = 0.1
_MAGIC = b"RSLTRSF1"
_NONCE_BYTES = _PROOF_BYTES = 32


@dataclass(eq=False, slots=True, kw_only=True)
class _Stranger:
    connected: socket.socket
    host: str
    peer: str
    deadline: float
    nonce: bytes = field(default_factory=lambda: secrets.token_bytes(_NONCE_BYTES))
    said: bytes = b""


class Door:
    """Accepts connections in one thread, and lets those in that know the secret.

    enter: is called in that thread, quick, with a greeted connection and its peer's address; it owns the connection.
    count: is told of what goes wrong, by kind: "not greeted", "too many strangers", "accept failed".
    """

    def __init__(
        self, ip: str, secret: str, enter: Callable[[socket.socket, str], None], count: Callable[[str], None]
    ) -> None:
        self._secret, self._enter, self._count = secret, enter, count
        self._closing = threading.Event()
        family = socket.AF_INET6 if ":" in ip else socket.AF_INET
        self._listener = socket.create_server((ip, 0), family=family, backlog=1024)
        self._listener.setblocking(False)
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        self._strangers: dict[_Stranger, None] = {}
        """The oldest first."""
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._attend, name="transfer door", daemon=True)
        self._thread.start()

    def close(self, limit_s: float) -> None:
        self._closing.set()
        with contextlib.suppress(OSError):  # closed before
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(limit_s)

    def _attend(self) -> None:
        while not self._closing.is_set():
            oldest = next(iter(self._strangers), None)
            wait_s = None if oldest is None else max(0.0, oldest.deadline - time.monotonic())
            for key, _ in self._selector.select(wait_s):
                if key.data is None:
                    self._accept()
                elif key.data in self._strangers:  # not hung up on meanwhile
                    self._hear(key.data)
            now = time.monotonic()
            for late in [each for each in self._strangers if each.deadline <= now]:
                self._hang_up(late, "not greeted")
        for stranger in list(self._strangers):
            self._hang_up(stranger, "closed")
        self._selector.close()
        self._listener.close()

    def _accept(self) -> None:
        try:
            connected, address = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):  # it has gone again
            return
        except OSError:
            if not self._closing.wait(_ACCEPT_AGAIN_S):  # out of descriptors, or the like: it may pass
                self._count("accept failed")
            return
        if len(self._strangers) >= STRANGERS_LIMIT:
            self._make_room()
        connected.setblocking(False)
        stranger = _Stranger(
            connected=connected,
            host=address[0],
            peer=f"{address[0]}:{address[1]}",
            deadline=time.monotonic() + GREETING_LIMIT_S,
        )
        self._strangers[stranger] = None
        self._selector.register(connected, selectors.EVENT_READ, stranger)
        try:
            connected.send(_MAGIC + stranger.nonce)
        except OSError:
            self._hang_up(stranger, "not greeted")

    def _make_room(self) -> None:
        """At the cost of the address that has most: others that knock at the same time are not shut out by it."""
        ((host, _),) = Counter(each.host for each in self._strangers).most_common(1)
        self._hang_up(next(each for each in self._strangers if each.host == host), "too many strangers")

    def _hear(self, stranger: _Stranger) -> None:
        wanted = _NONCE_BYTES + _PROOF_BYTES
        try:
            part = stranger.connected.recv(wanted - len(stranger.said))
        except BlockingIOError:
            return
        except OSError:
            part = b""
        stranger.said += part
        if not part:
            self._hang_up(stranger, "not greeted")
        elif len(stranger.said) == wanted:
            self._judge(stranger)

    def _judge(self, stranger: _Stranger) -> None:
        theirs, proof = stranger.said[:_NONCE_BYTES], stranger.said[_NONCE_BYTES:]
        if not hmac.compare_digest(proof, _proof(self._secret, b"client", stranger.nonce, theirs)):
            self._hang_up(stranger, "not greeted")
            return
        try:
            stranger.connected.send(_proof(self._secret, b"server", stranger.nonce, theirs))
            stranger.connected.setblocking(True)
        except OSError:
            self._hang_up(stranger, "not greeted")
            return
        self._forget(stranger)
        self._enter(stranger.connected, stranger.peer)

    def _hang_up(self, stranger: _Stranger, why: str) -> None:
        self._forget(stranger)
        stranger.connected.close()
        self._count(why)

    def _forget(self, stranger: _Stranger) -> None:
        del self._strangers[stranger]
        self._selector.unregister(stranger.connected)


def greet_as_client(connected: socket.socket, secret: str, peer: str, limit_s: float) -> None:
    """Raises NotAuthentic or PeerLost, within `limit_s`."""
    deadline, nonce = time.monotonic() + limit_s, secrets.token_bytes(_NONCE_BYTES)
    with _lost_in_greeting(peer):
        if _receive(connected, len(_MAGIC), deadline) != _MAGIC:
            raise NotAuthentic(f"{peer} is no process of ours: it greets otherwise")
        theirs = _receive(connected, _NONCE_BYTES, deadline)
        connected.sendall(nonce + _proof(secret, b"client", theirs, nonce))
        try:
            proof = _receive(connected, _PROOF_BYTES, deadline)
        except (EOFError, ConnectionError) as error:
            raise NotAuthentic(f"{peer} hung up on our proof: it has another run's secret, or has ended") from error
        if not hmac.compare_digest(proof, _proof(secret, b"server", theirs, nonce)):
            raise NotAuthentic(f"{peer} does not know the run's secret")
        connected.settimeout(None)


def _receive(connected: socket.socket, count: int, deadline: float) -> bytes:
    """So many bytes of a greeting, however they trickle in, until the deadline."""
    received = b""
    while len(received) < count:
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("the greeting took too long")
        connected.settimeout(left_s)
        part = connected.recv(count - len(received))
        if not part:
            raise EOFError("it closed the connection")
        received += part
    return received


@contextlib.contextmanager
def _lost_in_greeting(peer: str) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError) as error:
        raise PeerLost(f"{peer} was lost while greeting: {error}") from error


def _proof(secret: str, role: bytes, server_nonce: bytes, client_nonce: bytes) -> bytes:
    """The role keeps a proof from being sent back as one's own."""
    return hmac.digest(secret.encode(), _MAGIC + role + server_nonce + client_nonce, "sha256")
