"""Connections to other keepers that don't hang: whoever makes no progress for a while is given up.

A process that is stopped keeps its connections open, and its kernel keeps on acknowledging. So each link notes
when it last moved, and one thread cancels those that have not for STALL_LIMIT_S.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from actors.transfer import Connection, TransferCancelled, TransferError

CONNECT_LIMIT_S = 3.0
STALL_LIMIT_S = 10.0
_LOOK_S = 0.25
_PART_BYTES = 4 << 20

Address = tuple[str, int]
Fields = dict[str, Any]


class Stalled(TransferError):
    """The peer's connection is there, but nothing has moved for a while: it is stopped, or far too slow."""


class Link:
    """One connection to a peer; one thread at a time, `cancel` from any."""

    def __init__(
        self, connection: Connection, node: str, address: Address, purpose: object, count: Callable[[str, int], None]
    ) -> None:
        self.node = node
        self.address = address
        self.purpose = purpose
        self._connection = connection
        self._count = count
        self._stalled = False
        self._asking = False
        self._moved_at = time.monotonic()

    def request(
        self,
        fields: Fields,
        *,
        send: Iterable[memoryview] = (),
        receive_into: memoryview | Callable[[memoryview], object] | None = None,
    ) -> Fields:
        """As `Connection.request`; raises Stalled beside."""
        self._moved_at, self._asking = time.monotonic(), True
        try:
            target = self._counted(receive_into) if callable(receive_into) else receive_into
            reply = self._connection.request(fields, send=self._parts(send), receive_into=target)
            if isinstance(receive_into, memoryview):
                self._count("received", len(receive_into))
            return reply
        except TransferCancelled as error:
            if self._stalled:
                raise Stalled(f"{self._connection.peer} has not moved for {STALL_LIMIT_S:.0f} s") from error
            raise
        finally:
            self._asking = False

    def cancel(self) -> None:
        self._connection.cancel()

    def close(self) -> None:
        self._connection.close()

    def check(self, now: float) -> None:
        """Cancel it if it has not moved for too long."""
        if self._asking and now - self._moved_at > STALL_LIMIT_S:
            self._stalled = True
            self.cancel()

    def _parts(self, buffers: Iterable[memoryview]) -> Iterator[memoryview]:
        for buffer in buffers:
            for start in range(0, len(buffer), _PART_BYTES):
                part = buffer[start : start + _PART_BYTES]
                yield part
                self._count("sent", len(part))
                self._moved_at = time.monotonic()

    def _counted(self, consume: Callable[[memoryview], object]) -> Callable[[memoryview], object]:
        def consume_and_count(frame: memoryview) -> None:
            consume(frame)
            self._count("received", len(frame))
            self._moved_at = time.monotonic()

        return consume_and_count


class Links:
    """All links of one process's threads. counts: bytes "sent" and "received"."""

    def __init__(self, secret: str) -> None:
        self.counts: Counter[str] = Counter()
        self._secret = secret
        self._lock = threading.Lock()
        self._open: set[Link] = set()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="links", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def open(self, node: str, address: Address, purpose: object = None) -> Iterator[Link]:
        """purpose: whatever tells links apart when some are to be cancelled.

        Raises TransferError, also what the peer then does wrong."""
        peer = f"the keeper of node {node}"
        connection = Connection.open(address, self._secret, CONNECT_LIMIT_S, peer)
        link = Link(connection, node, address, purpose, self.count)
        try:
            with self._lock:
                self._open.add(link)
            if self._closing.is_set():
                raise TransferCancelled(f"no link to {peer}: this keeper ends")
            yield link
        finally:
            with self._lock:
                self._open.discard(link)
            link.close()

    def count(self, what: str, amount: int) -> None:
        with self._lock:
            self.counts[what] += amount

    def cancel(self, unwanted: Callable[[Link], bool]) -> None:
        """Ends requests under way on some links, in whatever threads, with TransferCancelled."""
        with self._lock:
            for link in self._open:
                if unwanted(link):
                    link.cancel()

    def close(self, limit_s: float = 1.0) -> None:
        """Ends them all. Only a thread that is just connecting takes up to twice CONNECT_LIMIT_S."""
        self._closing.set()
        self.cancel(lambda link: True)
        self._thread.join(limit_s)

    def _watch(self) -> None:
        while not self._closing.wait(_LOOK_S):
            now = time.monotonic()
            with self._lock:
                for link in self._open:
                    link.check(now)
