"""Blocks between keepers: requests and byte streams over plain TCP, apart from training's own connections.

A connection carries one request after another; two transfers at once are two connections. Whether a request is
of the right run, generation or snapshot is for `serve` to judge: only strangers are kept out here.
See `actors.stream` for what goes over the wire, and docs/decisions/0005-transfer-over-plain-sockets.md.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

from .stream import (
    END,
    MESSAGE,
    Buffer,
    Consumer,
    Incoming,
    NotAuthentic,
    Note,
    PeerLost,
    TransferCancelled,
    TransferCorrupt,
    TransferError,
    TransferRefused,
    Wire,
    greet_as_client,
    greet_as_server,
    tune,
)

__all__ = [
    "Connection",
    "NotAuthentic",
    "PeerLost",
    "Server",
    "Stream",
    "TransferCancelled",
    "TransferCorrupt",
    "TransferError",
    "TransferRefused",
]

Address: TypeAlias = "tuple[str, int]"
Fields: TypeAlias = "dict[str, Any]"

GREETING_LIMIT_S = 3.0
STRANGERS_LIMIT = 32
"""How many connections may be in their greeting at once; more are hung up on."""
_REASON_LIMIT = 4000


class Stream:
    """The payloads of one request, as `serve` sees them: first the peer's, then its own."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._incoming = Incoming(wire, END)

    @property
    def peer(self) -> str:
        return self._wire.peer

    def frames(self) -> Iterator[memoryview]:
        """What the peer sends, in bounded pieces, each valid until the next; a slow consumer slows the peer."""
        return self._incoming.frames()

    def receive_into(self, target: Buffer, note: Note = lambda *_: None) -> int:
        """What the peer sends, straight into a writable buffer. ValueError if it has not exactly its length.

        note: is told of each frame where it begins, its length and the xxh3_64 of its bytes.
        """
        return self._incoming.receive_into(target, note)

    def send(self, buffers: Iterable[Buffer]) -> None:
        """Payload of the reply, straight from contiguous buffers. What the peer still sends is dropped first."""
        self._incoming.finish()
        self._wire.send_payload(buffers)

    def finish(self) -> None:
        self._incoming.finish()


Serve: TypeAlias = "Callable[[Fields, Stream], Fields]"


class Server:
    """Answers requests, each connection in a thread of its own.

    serve(request, stream) -> reply, called in those threads, at the same time for several connections. Requests
        and replies are small JSON objects. A ValueError or KeyError refuses the request, with its text; any
        other exception is a bug: it ends the connection and goes to `threading.excepthook`.
    counts: what went wrong so far, by kind: "not greeted", "too many strangers", "broken", "accept failed".
    """

    def __init__(self, ip: str, secret: str, serve: Serve) -> None:
        self._secret = secret
        self._serve = serve
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._live: dict[threading.Thread, socket.socket] = {}
        self._strangers = threading.BoundedSemaphore(STRANGERS_LIMIT)
        self.counts: Counter[str] = Counter()
        family = socket.AF_INET6 if ":" in ip else socket.AF_INET
        self._listener = socket.create_server((ip, 0), family=family, backlog=128)
        self.address: Address = self._listener.getsockname()[:2]
        self._thread = threading.Thread(target=self._accept, name="transfer accept", daemon=True)
        self._thread.start()

    def close(self, limit_s: float = 10.0) -> None:
        """End all connections and threads. Only a `serve` that waits for something else may outlast the limit."""
        deadline = time.monotonic() + limit_s
        self._closing.set()
        with contextlib.suppress(OSError):  # closed before
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(limit_s)
        self._listener.close()
        with self._lock:
            threads = list(self._live)
            for connected in self._live.values():
                with contextlib.suppress(OSError):  # the peer has closed it
                    connected.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                connected, address = self._listener.accept()
            except OSError:
                if not self._closing.wait(0.1):  # out of descriptors, or the like: it may pass
                    self._count("accept failed")
                continue
            if not self._strangers.acquire(blocking=False):
                self._count("too many strangers")
                connected.close()
                continue
            peer = f"{address[0]}:{address[1]}"
            thread = threading.Thread(target=self._hold, args=(connected, peer), name=f"transfer {peer}", daemon=True)
            with self._lock:
                self._live[thread] = connected
            try:
                thread.start()
            except RuntimeError:  # no more threads; it may pass
                self._count("accept failed")
                self._strangers.release()
                self._forget(thread)

    def _hold(self, connected: socket.socket, peer: str) -> None:
        try:
            if self._greet(connected, peer):
                self._answer_all(Wire(connected, peer))
        finally:
            self._forget(threading.current_thread())

    def _forget(self, thread: threading.Thread) -> None:
        """Under the lock, so that `close` can't shut down a descriptor that is somebody else's by now."""
        with self._lock:
            self._live.pop(thread).close()

    def _greet(self, connected: socket.socket, peer: str) -> bool:
        try:
            greet_as_server(connected, self._secret, peer, GREETING_LIMIT_S)
            tune(connected)
        except (TransferError, OSError):
            self._count("not greeted")
            return False
        finally:
            self._strangers.release()
        return True

    def _answer_all(self, wire: Wire) -> None:
        try:
            while (header := wire.header()) is not None:
                if header.kind != MESSAGE:
                    raise TransferCorrupt(f"{wire.peer} sent a frame of kind {header.kind} instead of a request")
                self._answer(wire, wire.message(header))
        except TransferError:  # the peer has its own story of it
            self._count("broken")

    def _answer(self, wire: Wire, request: Fields) -> None:
        stream = Stream(wire)
        try:
            outcome: Fields = {"reply": self._serve(request, stream)}
        except (ValueError, KeyError) as error:
            outcome = {"refused": f"{type(error).__name__}: {error}"[:_REASON_LIMIT]}
        # Before what is left is dropped: the client then stops sending it.
        wire.send_message(outcome)
        stream.finish()

    def _count(self, what: str) -> None:
        if not self._closing.is_set():
            with self._lock:
                self.counts[what] += 1


class Connection:
    """A client's connection. Requests of several threads wait for each other; `cancel` does not wait."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._turn = threading.Lock()

    @classmethod
    def open(cls, address: Address, secret: str, limit_s: float, peer: str = "") -> Connection:
        """Connect and greet, within limit_s each.

        peer: who is there, for messages, e.g. "the keeper of node a".
        Raises PeerLost, or NotAuthentic if one of the two does not know the other's secret.
        """
        name = f"{peer} at {address[0]}:{address[1]}" if peer else f"{address[0]}:{address[1]}"
        try:
            connected = socket.create_connection(address, timeout=limit_s)
        except OSError as error:
            raise PeerLost(f"{name} can't be reached: {error}") from error
        try:
            greet_as_client(connected, secret, name, limit_s)
            tune(connected)
        except BaseException:
            connected.close()
            raise
        return cls(Wire(connected, name))

    @property
    def peer(self) -> str:
        return self._wire.peer

    def request(
        self,
        fields: Fields,
        *,
        send: Iterable[Buffer] = (),
        receive_into: Buffer | Consumer | None = None,
    ) -> Fields:
        """Send a request and its payload, receive the reply's payload, then the reply.

        send: contiguous buffers, sent as they are, without a copy; each is read when its turn comes.
        receive_into: a writable buffer that the payload must fill exactly, or a function that is given each
            frame and must not keep it. None: no payload is expected.
        Raises TransferRefused with the peer's reason, and the connection can be used further. After any other
        exception it is closed: PeerLost, TransferCorrupt, TransferCancelled, ValueError for a payload of another
        length than expected, and whatever the function raises.
        """
        with self._turn, self._whole():
            self._wire.send_message(fields)
            self._wire.send_payload(send, until_answered=True)
            self._wire.send(END)
            incoming = Incoming(self._wire, MESSAGE)
            outcome = self._receive(incoming, receive_into)
        if "refused" in outcome:
            raise TransferRefused(f"{self.peer} refused: {outcome['refused']}")
        reply: Fields = outcome["reply"]
        return reply

    def _receive(self, incoming: Incoming, target: Buffer | Consumer | None) -> Fields:
        if target is None:
            target = memoryview(b"")
        problem: ValueError | None = None
        if callable(target):
            for frame in incoming.frames():
                target(frame)
        else:
            try:
                incoming.receive_into(target)
            except ValueError as error:
                problem = error
        outcome = self._wire.message(incoming.finish())
        if outcome.keys() not in ({"reply"}, {"refused"}):
            raise TransferCorrupt(f"{self.peer} sent no reply, but {outcome!r:.80}")
        if problem is not None and "reply" in outcome:  # else the refusal explains it
            raise problem
        return outcome

    def cancel(self) -> None:
        """From any thread: a request under way ends at once, with TransferCancelled; later ones too."""
        self._wire.cancel()

    def close(self) -> None:
        """Call it where requests are made; `cancel` ends those of other threads."""
        self._wire.close()

    @contextlib.contextmanager
    def _whole(self) -> Iterator[None]:
        """Half an exchange can't be taken up again."""
        try:
            yield
        except BaseException:
            self.close()
            raise
