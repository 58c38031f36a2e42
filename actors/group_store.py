"""Where the ranks of a generation leave the addresses of their connections for each other.

torch's TCPStore listens on all interfaces and believes whoever connects. This one speaks over greeted connections
(see `actors.transfer`), and torch calls it as it calls its own. Every rank serves one; a plan says which is used.

A key is written once. The server keeps the spaces of the newest few generations and a bounded number of bytes.
"""

from __future__ import annotations

import datetime
import itertools
import threading
import time
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from .reachability import echo
from .transfer import Address, Connection, Fields, Server, Stream, TransferError, TransferRefused

CONNECT_LIMIT_S = 15.0
SPACES_KEPT = 4
VALUE_LIMIT_BYTES = 4 << 20
LIMIT_BYTES = 256 << 20
"""Of all values that a server keeps."""
_AT_ONCE = 512
"""Values in one answer."""

if TYPE_CHECKING:
    Store: Any
else:
    Store = dist.Store


class GroupStoreServer:
    """The server in one rank's process, on a free port of this address; close it."""

    def __init__(self, ip: str, secret: str) -> None:
        self._changed = threading.Condition()
        self._spaces: dict[str, dict[str, bytes]] = {}
        """By generation, the oldest first."""
        self._closed = False
        self._server = Server(ip, secret, self._serve)
        self.port: int = self._server.address[1]

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._server.close()

    def _serve(self, request: Fields, stream: Stream) -> Fields:
        if request.get("echo"):
            return echo(stream)
        space, key = str(request["space"]), str(request["key"])
        if "bytes" in request:
            return self._set(space, key, int(request["bytes"]), stream)
        return self._get(space, key, int(request["have"]), float(request["limit_s"]), stream)

    def _set(self, space: str, key: str, count: int, stream: Stream) -> Fields:
        if not 0 <= count <= VALUE_LIMIT_BYTES:
            raise ValueError(f"{key} has {count} bytes, more than {VALUE_LIMIT_BYTES}")
        value = bytearray(count)
        stream.receive_into(value)
        with self._changed:
            values = self._spaces.setdefault(space, {})
            if values.setdefault(key, bytes(value)) != value:
                raise ValueError(f"{key} has been written before, and not so")
            while len(self._spaces) > SPACES_KEPT:
                del self._spaces[next(iter(self._spaces))]
            if sum(len(each) for values in self._spaces.values() for each in values.values()) > LIMIT_BYTES:
                values.pop(key, None)
                raise ValueError(f"{key} is too much: the store keeps {LIMIT_BYTES} bytes")
            self._changed.notify_all()
        return {}

    def _get(self, space: str, key: str, have: int, limit_s: float, stream: Stream) -> Fields:
        """The next values beyond those that the client has, once that of `key` is there or the time is up."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or key in self._spaces.get(space, {}), limit_s)
            found = list(itertools.islice(self._spaces.get(space, {}).items(), have, have + _AT_ONCE))
        stream.send(value for _, value in found)
        return {"values": [[name, len(value)] for name, value in found]}


class GroupStore(Store):  # type: ignore[misc]
    """A client's end, for one generation. Raises TransferError, also where a key is not written in time."""

    def __init__(self, address: Address, secret: str, space: str, limit_s: float) -> None:
        super().__init__()
        self._opened_with = (address, secret, space, limit_s)
        self._space, self._limit_s = space, limit_s
        self._known: dict[str, bytes] = {}
        self._lock = threading.Lock()
        self._connection = Connection.open(address, secret, min(limit_s, CONNECT_LIMIT_S), "the generation's store")

    def close(self) -> None:
        self._connection.close()

    # Called by torch

    def set(self, key: str, value: bytes | str) -> None:
        data = value.encode() if isinstance(value, str) else bytes(value)
        self._connection.request({"space": self._space, "key": key, "bytes": len(data)}, send=[data])

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._known[key]

    def wait(self, keys: list[str], timeout: datetime.timedelta | None = None) -> None:
        limit_s = self._limit_s if timeout is None else min(timeout.total_seconds(), self._limit_s)
        deadline = time.monotonic() + limit_s
        with self._lock:
            for key in keys:
                while key not in self._known:
                    if time.monotonic() >= deadline:
                        raise TransferRefused(f"nobody has written {key} within {limit_s:.0f} s")
                    self._fetch(key, deadline - time.monotonic())

    def check(self, keys: list[str]) -> bool:
        with self._lock:
            for key in keys:
                if key not in self._known:
                    self._fetch(key, 0.0)
            return all(key in self._known for key in keys)

    def clone(self) -> GroupStore:
        return GroupStore(*self._opened_with)

    def _fetch(self, key: str, limit_s: float) -> None:
        data = bytearray()
        wanted = {"space": self._space, "key": key, "have": len(self._known), "limit_s": limit_s}
        answer = self._connection.request(wanted, receive_into=data.extend)
        at = 0
        for name, count in answer["values"]:
            self._known[name] = bytes(data[at : at + count])
            at += count
        if at != len(data):
            raise TransferError(f"the generation's store sent {len(data)} bytes instead of {at}")
