"""Connections to what a run serves: few, each with a deadline, and none of them can keep another one from its answer.

    accepted --a whole request came in time--> answering --> idle --another request--> answering ...
        |                                          |           |
        +-- deadline passed -----------------------+-----------+--> aborted, without waiting for the peer

Whoever trickles a request, never reads its answer, or only holds a connection, is past its deadline. When there are as
many connections as may be, the one that has been idle longest makes room; if all are being answered, the new one gets
a 503. Connections and answers are paced: a flood of them waits, and costs the run a bounded share of one core.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from aiohttp import web

SWEEPS_PER_S = 5.0
SEND_BUFFER_BYTES = 128 << 10
"""In the kernel, for each connection: a slow reader costs no more."""
BUSY = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\nRetry-After: 5\r\n\r\n"
BACKLOG = 128

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]

quiet = logging.getLogger("resilient.connections")
quiet.setLevel(logging.CRITICAL)  # what clients send is their affair, and anybody could fill a log with it


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    connections: int = 64
    listeners: int = 24
    """Of them, those that are told of every change."""
    request_s: float = 5.0
    """From a connection's beginning until its first request is there."""
    answer_s: float = 10.0
    """Until an answer, or one message of many, has been taken."""
    idle_s: float = 30.0
    """From an answer to the next request."""
    turns_per_s: float = 200.0
    """Connections and answers together."""


class Pace:
    """At most so many turns per second, in the order in which they were asked for."""

    def __init__(self, per_s: float) -> None:
        self._each_s = 1.0 / per_s
        self._next = 0.0

    async def turn(self) -> None:
        now = asyncio.get_running_loop().time()
        # A little burst is free: a page that is opened asks for several files at once.
        self._next = max(self._next + self._each_s, now - 10 * self._each_s)
        if self._next > now:
            await asyncio.sleep(self._next - now)


class Connection(web.RequestHandler):
    """One client's. `deadline`: when it is aborted, whatever it is doing."""

    def __init__(self, server: web.Server, among: Connections) -> None:
        super().__init__(
            server,
            loop=among.loop,
            access_log=quiet,
            logger=quiet,
            keepalive_timeout=10 * among.limits.idle_s,  # ours is shorter
            lingering_time=0.0,
        )
        self._among = among
        self.answering = False
        self.deadline = among.loop.time() + among.limits.request_s

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._among.open.add(self)
        super().connection_made(transport)

    def connection_lost(self, error: BaseException | None) -> None:
        self._among.open.discard(self)
        super().connection_lost(error)

    def begins(self, and_waits_s: float = 0.0) -> None:
        """A request is there, or one of the messages of an answer is to be written, after a wait of ours."""
        self.answering, self.deadline = True, self._among.loop.time() + self._among.limits.answer_s + and_waits_s

    def ends(self) -> None:
        """The answer has been written."""
        self.answering, self.deadline = False, self._among.loop.time() + self._among.limits.idle_s

    def abort(self) -> None:
        if isinstance(self.transport, asyncio.WriteTransport):
            self.transport.abort()


@dataclass(slots=True, eq=False)
class Connections:
    """All of them. To be used from the loop's thread."""

    loop: asyncio.AbstractEventLoop
    handler: Handler
    limits: Limits = field(default_factory=Limits)
    open: set[Connection] = field(default_factory=set)
    refused: int = 0
    """Connections for which there was no room."""
    pace: Pace = field(init=False)
    _server: web.Server = field(init=False)

    def __post_init__(self) -> None:
        self.pace = Pace(self.limits.turns_per_s)
        self._server = web.Server(self._paced, loop=self.loop, handler_cancellation=True)

    async def accept(self, listening: socket.socket) -> None:
        """For ever, until cancelled."""
        while True:
            try:
                client, _ = await self.loop.sock_accept(listening)
            except OSError:  # it has gone already, or this process has no descriptors left
                await asyncio.sleep(1 / SWEEPS_PER_S)
                continue
            await self._take(client)
            await self.pace.turn()

    async def _take(self, client: socket.socket) -> None:
        client.setblocking(False)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        if len(self.open) >= self.limits.connections and not self._make_room():
            self.refused += 1
            with client, contextlib.suppress(OSError):  # it has gone already
                client.send(BUSY)
            return
        try:
            await self.loop.connect_accepted_socket(lambda: Connection(self._server, self), client)
        except OSError:  # it has gone already
            client.close()

    def _make_room(self) -> bool:
        """At the cost of the one whose deadline comes first, of those that are not being answered."""
        idle = [found for found in self.open if not found.answering]
        if not idle:
            return False
        found = min(idle, key=lambda connection: connection.deadline)
        found.abort()
        self.open.discard(found)
        return True

    async def sweep(self) -> None:
        """For ever, until cancelled."""
        while True:
            await asyncio.sleep(1 / SWEEPS_PER_S)
            now = self.loop.time()
            for connection in [found for found in self.open if found.deadline < now]:
                connection.abort()

    def abort(self) -> None:
        for connection in list(self.open):
            connection.abort()

    async def _paced(self, request: web.BaseRequest) -> web.StreamResponse:
        connection = request.protocol
        assert isinstance(connection, Connection)
        connection.begins()
        try:
            await self.pace.turn()
            response = await self.handler(request)
            # Here, not after the return, so that the deadline covers it.
            await response.prepare(request)
            await response.write_eof()
            return response
        finally:
            connection.ends()
