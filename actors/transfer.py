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

from .greeting import Door, greet_as_client
from .stream import (
    END,
    MESSAGE,
    SILENCE_LIMIT_S,
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
    left(peer): called where a greeted connection has ended, unless by `close`; peer as in `Stream`.
    silence_limit_s: how long a peer's host may acknowledge nothing.
    counts: what went wrong so far, by kind: "not greeted", "too many strangers", "broken", "accept failed".
    """

    def __init__(
        self,
        ip: str,
        secret: str,
        serve: Serve,
        left: Callable[[str], None] = lambda peer: None,
        silence_limit_s: int = SILENCE_LIMIT_S,
    ) -> None:
        self._serve = serve
        self._left = left
        self._silence_limit_s = silence_limit_s
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._live: dict[threading.Thread, socket.socket] = {}
        self.counts: Counter[str] = Counter()
        self._door = Door(ip, secret, self._enter, self._count)
        self.address: Address = self._door.address

    def close(self, limit_s: float = 10.0) -> None:
        """End all connections and threads. Only a `serve` that waits for something else may outlast the limit."""
        deadline = time.monotonic() + limit_s
        self._closing.set()
        self._door.close(limit_s)
        with self._lock:
            threads = list(self._live)
            for connected in self._live.values():
                with contextlib.suppress(OSError):  # the peer has closed it
                    connected.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _enter(self, connected: socket.socket, peer: str) -> None:
        thread = threading.Thread(target=self._hold, args=(connected, peer), name=f"transfer {peer}", daemon=True)
        with self._lock:
            self._live[thread] = connected
        try:
            thread.start()
        except RuntimeError:  # no more threads; it may pass
            self._count("accept failed")
            self._forget(thread)

    def _hold(self, connected: socket.socket, peer: str) -> None:
        try:
            with contextlib.suppress(OSError):  # it has gone already, which shows where it is read
                tune(connected, self._silence_limit_s)
            self._answer_all(Wire(connected, peer))
        finally:
            self._forget(threading.current_thread())
            if not self._closing.is_set():
                self._left(peer)

    def _forget(self, thread: threading.Thread) -> None:
        """Under the lock, so that `close` can't shut down a descriptor that is somebody else's by now."""
        with self._lock:
            self._live.pop(thread).close()

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
    def open(
        cls, address: Address, secret: str, limit_s: float, peer: str = "", silence_limit_s: int = SILENCE_LIMIT_S
    ) -> Connection:
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
            tune(connected, silence_limit_s)
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
