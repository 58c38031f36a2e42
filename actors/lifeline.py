"""Connections that say one thing only: when the kernel closes one, the process behind it has ended.

Ranks and keepers open one to the controller, greeted as transfers are, and say who they are.
A closed connection is seen within a millisecond, also when a whole host's processes die at once and
nobody is left to report it. It can also mean a broken network, so it is evidence, not a verdict.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from .transfer import Connection, Fields, Server, Stream, TransferError

CONNECT_LIMIT_S = 5.0
SILENCE_LIMIT_S = 600
"""A network that is away for a while is for heartbeats to judge: here it would look like an end."""
_NAME = re.compile(r"(rank|keeper) \d+ \S+")


class Lifelines:
    """The controller's end: accepts, and calls `lost(name)` when a connection has been closed."""

    def __init__(self, ip: str, secret: str, lost: Callable[[str], None]) -> None:
        self._lost = lost
        self._names: dict[str, str] = {}
        """By peer; each is touched by its connection's thread only."""
        self._server = Server(ip, secret, self._begin, self._end, SILENCE_LIMIT_S)
        self.address: tuple[str, int] = self._server.address

    def _begin(self, request: Fields, stream: Stream) -> Fields:
        name = str(request["lifeline"])
        if not _NAME.fullmatch(name):
            raise ValueError(f"a lifeline is of a rank or keeper with its node, not of {name!r}")
        self._names[stream.peer] = name
        return {}

    def _end(self, peer: str) -> None:
        name = self._names.pop(peer, None)
        if name is not None:
            self._lost(name)

    def close(self) -> None:
        self._server.close(0.0)


class Lifeline:
    """The process's end, opened anew whenever a controller names a new address."""

    def __init__(self, name: str, secret: str) -> None:
        self._name, self._secret = name, secret
        self._address: tuple[str, int] | None = None
        self._connection: Connection | None = None

    def hold(self, address: tuple[str, int]) -> bool:
        """Connect there, unless it is connected already; whether this is another controller than before."""
        if address == self._address:
            return False
        former, self._address = self._connection, None
        opened = self._open(address)
        if opened is not None:
            self._connection, self._address = opened, address
        if former is not None:
            former.close()
        return former is not None

    def _open(self, address: tuple[str, int]) -> Connection | None:
        connection = None
        try:
            connection = Connection.open(
                address, self._secret, CONNECT_LIMIT_S, "the controller", silence_limit_s=SILENCE_LIMIT_S
            )
            connection.request({"lifeline": self._name})
        except TransferError:  # the controller has gone again; it will name a new address
            if connection is not None:
                connection.close()
            return None
        return connection
