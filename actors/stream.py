"""Frames of bytes over one TCP connection between two processes that share a secret.

    greeting    see `actors.greeting`
    frame       16 bytes: length u32, kind u32, xxh3_64 u64 of the bytes (seeded with kind); the bytes
    request     MESSAGE (a JSON object), DATA ..., END
    reply       DATA ..., MESSAGE: the outcome comes last, so that also a failure in the middle can be told

Bounded: a frame has at most FRAME_BYTES, a message MESSAGE_LIMIT_BYTES, and a connection one buffer of a frame.
What is received is not acknowledged, nor read ahead: a slow consumer stops its sender through TCP.

The proofs keep strangers out, the checksums find broken memory and networks. Nothing is encrypted: the network
between the nodes is trusted not to tamper with a connection that has been greeted.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

import xxhash

FRAME_BYTES = 1 << 20
MESSAGE_LIMIT_BYTES = 64 << 10
SILENCE_LIMIT_S = 15
"""How long a host may acknowledge nothing, or a consumer take nothing, until the connection is given up."""

DATA, MESSAGE, END = 1, 2, 3
_LIMITS = {DATA: FRAME_BYTES, MESSAGE: MESSAGE_LIMIT_BYTES, END: 0}
_HEADER = struct.Struct("<IIQ")

Buffer: TypeAlias = "bytes | bytearray | memoryview"
Consumer: TypeAlias = "Callable[[memoryview], object]"
"""Is given each received frame, valid until it returns; the next is not read before."""

Note: TypeAlias = "Callable[[int, int, int], object]"


class TransferError(Exception):
    """A transfer did not happen, or not to its end. The message names the peer."""


class PeerLost(TransferError):
    """The connection broke or could not be made: the process, its host or the network between has gone."""


class NotAuthentic(TransferError):
    """The peer does not know the run's secret, or ours is not its run's. No request was exchanged."""


class TransferCorrupt(TransferError):
    """Bytes arrived that are not those that were sent. The connection is closed; a new one may be tried."""


class TransferCancelled(TransferError):
    """Somebody in this process called `cancel`. Nobody is at fault."""


class TransferRefused(TransferError):
    """The peer is well and says no; the message has its reason. The connection can be used further."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    kind: int
    length: int
    checksum: int


class Wire:
    """One end of a greeted connection. One thread at a time; `cancel` also from others."""

    def __init__(self, connected: socket.socket, peer: str) -> None:
        self.peer = peer
        self._socket = connected
        self._cancelled = False
        self._closing = threading.Lock()
        self._frame: memoryview | None = None
        self._poll = select.poll()
        self._poll.register(connected, select.POLLIN)

    def send(self, kind: int, data: Buffer = b"") -> None:
        checksum = xxhash.xxh3_64_intdigest(data, seed=_seed(kind))
        header = _HEADER.pack(len(data), kind, checksum)
        try:
            sent = self._socket.sendmsg([header, data])
            if sent < len(header) + len(data):  # a signal came in between
                self._socket.sendall(header[sent:])
                self._socket.sendall(memoryview(data)[max(0, sent - len(header)) :])
        except OSError as error:
            self._lost(error)

    def send_message(self, fields: dict[str, Any]) -> None:
        """Raises ValueError if it is too long, TypeError if it is no JSON; then nothing was sent."""
        data = json.dumps(fields, allow_nan=False).encode()
        if len(data) > MESSAGE_LIMIT_BYTES:
            raise ValueError(f"a message of {len(data)} bytes is longer than {MESSAGE_LIMIT_BYTES}")
        self.send(MESSAGE, data)

    def send_payload(self, buffers: Iterable[Buffer], *, until_answered: bool = False) -> None:
        """Straight from the buffers, cut into frames.

        until_answered: leave off as soon as the peer has something to say, which makes the rest pointless.
        """
        for buffer in buffers:
            view = memoryview(buffer).cast("B")
            for start in range(0, len(view), FRAME_BYTES):
                if until_answered and self._poll.poll(0):
                    return
                self.send(DATA, view[start : start + FRAME_BYTES])

    def header(self) -> Header | None:
        """The next frame's header; None if the peer has closed the connection in good order before it."""
        raw = bytearray(_HEADER.size)
        if not self._fill(memoryview(raw), may_end=True):
            return None
        length, kind, checksum = _HEADER.unpack(raw)
        if length > _LIMITS.get(kind, -1):
            raise TransferCorrupt(f"{self.peer} sent a frame of kind {kind} and {length} bytes, which there is not")
        return Header(kind=kind, length=length, checksum=checksum)

    def body(self, header: Header, target: memoryview | None = None) -> memoryview:
        """The frame's bytes, in the target or else in the connection's one buffer. Raises TransferCorrupt."""
        if target is None:
            if self._frame is None:
                self._frame = memoryview(bytearray(FRAME_BYTES))
            target = self._frame[: header.length]
        self._fill(target)
        if xxhash.xxh3_64_intdigest(target, seed=_seed(header.kind)) != header.checksum:
            raise TransferCorrupt(f"a frame of {header.length} bytes from {self.peer} arrived damaged")
        return target

    def message(self, header: Header) -> dict[str, Any]:
        try:
            fields = json.loads(bytes(self.body(header)))
        except (ValueError, RecursionError) as error:
            raise TransferCorrupt(f"{self.peer} sent no JSON: {error}") from error
        if not isinstance(fields, dict):
            raise TransferCorrupt(f"{self.peer} sent no JSON object")
        return fields

    def cancel(self) -> None:
        """From any thread: what is being sent or received ends at once, with TransferCancelled."""
        self._cancelled = True
        # Under a lock, lest `close` gives the descriptor to somebody else just now.
        with self._closing, contextlib.suppress(OSError):  # closed, or the peer was faster
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with self._closing:
            self._socket.close()

    def _fill(self, target: memoryview, may_end: bool = False) -> bool:
        """Whether the target is full; it is not only if `may_end` and nothing came at all."""
        received = 0
        while received < len(target):
            try:
                count = self._socket.recv_into(target[received:], 0, socket.MSG_WAITALL)
            except OSError as error:
                self._lost(error)
            if count == 0:
                if may_end and received == 0 and not self._cancelled:
                    return False
                self._lost(EOFError("it closed the connection in the middle"))
            received += count
        return True

    def _lost(self, error: Exception) -> NoReturn:
        if self._cancelled:
            raise TransferCancelled(f"the transfer with {self.peer} was cancelled") from error
        raise PeerLost(f"{self.peer} was lost: {error}") from error


class Incoming:
    """The payload that a peer sends, up to its frame of kind `last`; each byte is read once."""

    def __init__(self, wire: Wire, last: int) -> None:
        self._wire = wire
        self._last = last
        self._end: Header | None = None

    def frames(self) -> Iterator[memoryview]:
        """Each frame in the connection's one buffer, valid until the next is asked for."""
        while (header := self._next()) is not None:
            yield self._wire.body(header)

    def receive_into(self, target: Buffer, note: Note = lambda *_: None) -> int:
        """Fill a writable buffer with the payload, without a copy in between; its length in bytes.

        note: is told of each frame where it begins, its length and the xxh3_64 of its bytes.
        Raises ValueError if the payload has not exactly this length.
        """
        view, received = memoryview(target).cast("B"), 0
        while (header := self._next()) is not None:
            if header.length > len(view) - received:
                self._wire.body(header)
                raise ValueError(f"the payload of {self._wire.peer} is longer than {len(view)} bytes")
            self._wire.body(header, view[received : received + header.length])
            note(received, header.length, header.checksum)
            received += header.length
        if received < len(view):
            raise ValueError(f"the payload of {self._wire.peer} has {received} bytes, not {len(view)}")
        return received

    def finish(self) -> Header:
        """Drop what is left; the header of the last frame. A MESSAGE is still to be read."""
        for _ in self.frames():
            pass
        assert self._end is not None
        return self._end

    def _next(self) -> Header | None:
        if self._end is not None:
            return None
        header = self._wire.header()
        if header is None:
            raise PeerLost(f"{self._wire.peer} was lost: it closed the connection in the middle")
        if header.kind == DATA:
            return header
        if header.kind != self._last:
            raise TransferCorrupt(f"{self._wire.peer} sent a frame of kind {header.kind} out of turn")
        if header.kind == END:
            self._wire.body(header)
        self._end = header
        return None


def tune(connected: socket.socket, silence_limit_s: int = SILENCE_LIMIT_S) -> None:
    """No waiting for more to send, and a host that vanished is noticed within silence_limit_s."""
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, silence_limit_s // 3)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, silence_limit_s // 3)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, silence_limit_s * 1000)


def _seed(kind: int) -> int:
    """None for DATA, so that its checksums can be kept with the bytes. A wrong length gives other bytes anyway."""
    return 0 if kind == DATA else kind
