"""Parcels between ranks: tensors that one process leaves with another, under a key, whenever they are ready.

Nobody waits for a receiver to be ready, and no order is kept between parcels. A parcel is delivered at least once:
its sender repeats it until it is acknowledged, and what comes twice is dropped. So a broken connection loses nothing.
Whoever asks for a key that is not there is woken when it has come; whether to wait is not decided here.

Threads: one accepts, one serves each connection, and one per peer sends.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from actors.transfer import Address, Connection, Fields, NotAuthentic, Server, Stream, TransferError
from snapshot.front import bytes_of
from snapshot.memory import dtype_named

Key: TypeAlias = "tuple[int, ...]"
"""The first number is its age: parcels of an age that is over are refused."""

CONNECT_LIMIT_S = 3.0
AGAIN_S = 0.2
LARGEST_BYTES = 1 << 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Parcel:
    """tensors: dense, on any device; `marks[i]` is a number that travels with tensor i."""

    tensors: tuple[Tensor, ...]
    marks: tuple[int, ...]


class Post:
    """One process's parcels. All methods may be called from any thread."""

    def __init__(
        self, ip: str, secret: str, *, arrived: Callable[[], None], broken: Callable[[Hashable, str], None]
    ) -> None:
        """arrived: called after each new parcel. broken: called with a peer that can't be reached, and why; once until
        it can be again."""
        self._secret = secret
        self._arrived, self._broken = arrived, broken
        self._lock = threading.Lock()
        self._here: dict[Key, Parcel] = {}
        self._age = 0
        self._peers: dict[Hashable, _Peer] = {}
        self.counts = {"sent": 0, "received": 0, "twice": 0, "refused": 0}
        """Parcels, by what came of them."""
        self._server = Server(ip, secret, self._serve)

    @property
    def port(self) -> int:
        return self._server.address[1]

    def send(self, peer: Hashable, address: Address, key: Key, parcel: Parcel) -> None:
        """Leave it with this peer, sooner or later. The tensors must not change until then."""
        with self._lock:
            known = self._peers.get(peer)
            if known is None or known.address != address:
                if known is not None:
                    known.close()
                known = self._peers[peer] = _Peer(self, peer, address, self._secret)
        known.send(key, parcel)

    def get(self, key: Key) -> Parcel | None:
        with self._lock:
            return self._here.get(key)

    def keys(self) -> set[Key]:
        with self._lock:
            return set(self._here)

    def drop(self, unwanted: Callable[[Key], bool]) -> None:
        """Forget what has come under these keys."""
        with self._lock:
            self._here = {key: parcel for key, parcel in self._here.items() if not unwanted(key)}

    def begin_age(self, age: int) -> None:
        """Parcels of earlier ages count no more, whenever they come."""
        with self._lock:
            self._age = max(age, self._age)
        self.drop(lambda key: key[0] < age)

    def keep_to(self, peers: Mapping[Hashable, Address]) -> None:
        """Whatever is still to be sent to others is not sent any more."""
        with self._lock:
            gone = [peer for peer in self._peers if peer not in peers]
            for peer in gone:
                self._peers.pop(peer).close()

    def close(self) -> None:
        self.keep_to({})
        self._server.close()

    def _serve(self, fields: Fields, stream: Stream) -> Fields:
        key, specs = tuple(map(int, fields["key"])), fields["tensors"]
        with self._lock:
            refused, twice = key[0] < self._age, key in self._here
        if refused or twice:
            stream.finish()
            self._count("refused" if refused else "twice")
            return {}
        kinds = [_kind(spec) for spec in specs]
        data = torch.empty(sum(kind.nbytes for kind in kinds), dtype=torch.uint8)
        stream.receive_into(data.numpy().data)
        parcel = Parcel(tensors=_cut(data, kinds), marks=tuple(int(spec["mark"]) for spec in specs))
        with self._lock:
            if key[0] >= self._age:
                self._here[key] = parcel
        self._count("received")
        self._arrived()
        return {}

    def _count(self, what: str) -> None:
        with self._lock:
            self.counts[what] += 1


class _Peer:
    def __init__(self, post: Post, name: Hashable, address: Address, secret: str) -> None:
        self.address = address
        self._post, self._name, self._secret = post, name, secret
        self._waiting: queue.SimpleQueue[tuple[Key, Parcel] | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._connection: Connection | None = None
        self._thread = threading.Thread(target=self._send_all, name=f"post to {name}", daemon=True)
        self._thread.start()

    def send(self, key: Key, parcel: Parcel) -> None:
        self._waiting.put((key, parcel))

    def close(self) -> None:
        """Without waiting for what is under way."""
        self._closed.set()
        self._waiting.put(None)
        connection = self._connection
        if connection is not None:
            connection.cancel()

    def _send_all(self) -> None:
        try:
            while (todo := self._waiting.get()) is not None and not self._closed.is_set():
                try:
                    self._send_until_there(*todo)
                except Exception as error:  # noqa: BLE001  the thread's edge: the peer waits for this parcel
                    self._post._broken(self._name, f"{todo[0]} could not be sent: {error!r}")
        finally:
            if self._connection is not None:
                self._connection.close()

    def _send_until_there(self, key: Key, parcel: Parcel) -> None:
        tensors = [tensor.detach().cpu().contiguous() for tensor in parcel.tensors]
        fields = {"key": list(key), "tensors": [_spec(*pair) for pair in zip(tensors, parcel.marks, strict=True)]}
        failed = 0
        while not self._closed.is_set():
            try:
                if self._connection is None:
                    self._connection = Connection.open(self.address, self._secret, CONNECT_LIMIT_S, str(self._name))
                self._connection.request(fields, send=[bytes_of(tensor).numpy().data for tensor in tensors])
                self._post._count("sent")
                return
            except TransferError as error:
                self._connection = None
                if self._closed.is_set():
                    return
                failed += 1
                if failed == 1:
                    continue  # a connection may break for nothing
                if failed == 2:
                    self._post._broken(self._name, str(error))
                if isinstance(error, NotAuthentic):
                    return
                self._closed.wait(AGAIN_S)


def _spec(tensor: Tensor, mark: int) -> dict[str, Any]:
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape), "mark": mark}


@dataclass(frozen=True, slots=True)
class _Kind:
    dtype: torch.dtype
    shape: torch.Size

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


def _kind(spec: dict[str, Any]) -> _Kind:
    """Raises ValueError or KeyError."""
    dtype, shape = dtype_named(spec["dtype"]), [int(size) for size in spec["shape"]]
    if any(size < 0 for size in shape):
        raise ValueError(f"a parcel with a tensor of {spec!r:.200}")
    kind = _Kind(dtype, torch.Size(shape))
    if kind.nbytes > LARGEST_BYTES:
        raise ValueError(f"a parcel with a tensor of {kind.nbytes} bytes")
    return kind


def _cut(data: Tensor, kinds: Sequence[_Kind]) -> tuple[Tensor, ...]:
    """One after the other, each a view of the data where its type can lie there, else a copy."""
    made, at = [], 0
    for kind in kinds:
        part, at = data[at : at + kind.nbytes], at + kind.nbytes
        aligned = part.storage_offset() % kind.dtype.itemsize == 0
        made.append((part if aligned else part.clone()).view(kind.dtype).view(kind.shape))
    return tuple(made)
