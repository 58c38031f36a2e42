"""The communicator of one generation: build it, move bytes over it, or give it up.

It knows ranks and bytes and decides nothing. A group is never repaired: after a failure it is
abandoned, and the next generation builds its own.

What gloo does and does not do, which shapes this file:
    * no wait is given a timeout: a timeout would close all connections of the group;
    * nothing wakes a wait but the peer's process ending, so a group is used by one thread, which can
      be left behind, and an abandoned group stays referenced, since destroying it would block.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

FORM_LIMIT_S = 300.0
"""A formation that takes longer has failed: far beyond what any cluster needs."""
NEVER = datetime.timedelta(days=10_000)

# torch's stubs lack these.
Gloo: Any = dist.ProcessGroupGloo
TCPStore: Any = dist.TCPStore  # type: ignore[attr-defined]
PrefixStore: Any = dist.PrefixStore  # type: ignore[attr-defined]
MINIMUM: Any = dist.ReduceOp.MIN

_abandoned: list[Group] = []


class LinkBroken(RuntimeError):
    """A connection of the group failed: a peer has died, or the network between the two has.

    Nobody's mistake. It is a hint only: who is dead is for the controller to say.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """Bytes to or from a peer: a contiguous uint8 tensor of shape (bytes,)."""

    data: Tensor
    peer: int
    tag: int


class Pending:
    """Transfers under way. `wait` returns when they are complete, or raises LinkBroken."""

    __slots__ = ("_held", "_works")

    def __init__(self, works: list[Any], held: object) -> None:
        self._works = works
        self._held = held

    def wait(self) -> None:
        try:
            for work in self._works:
                work.wait()
        except RuntimeError as error:
            raise LinkBroken(str(error)) from error


def open_store(host: str) -> Any:
    """A store server in this process, on a free port; its `port` goes into the plan."""
    return TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=datetime.timedelta(seconds=FORM_LIMIT_S))


class Group:
    """Connections between all ranks of one generation."""

    def __init__(
        self, *, store: tuple[str, int], host: str, prefix: str, rank: int, size: int, device: torch.device
    ) -> None:
        """Connect to all others; blocks until they have come too.

        store: address of the store that the plan names. host: this rank's own address. prefix: unique
        per run, attempt and generation. Raises LinkBroken when the store or a peer cannot be reached.
        """
        self.rank, self.size, self.device = rank, size, device
        limit = datetime.timedelta(seconds=FORM_LIMIT_S)
        try:
            client = TCPStore(store[0], store[1], is_master=False, wait_for_workers=False, timeout=limit)
            self._store = PrefixStore(prefix, client)
            self._control = Gloo(self._store, rank, size, _gloo_options(host))
            self._data: Any = self._control
            if device.type == "cuda":
                self._data = _nccl(PrefixStore("nccl", self._store), rank, size)
        except RuntimeError as error:  # torch.distributed's errors all derive from it
            raise LinkBroken(f"generation's group could not form: {error}") from error

    def minimum(self, values: Sequence[int]) -> list[int]:
        """The element-wise minimum over all ranks of a few 64-bit integers."""
        vector = torch.tensor(values, dtype=torch.int64)
        options = dist.AllreduceOptions()
        options.reduceOp = MINIMUM
        Pending([self._control.allreduce([vector], options)], vector).wait()
        return [int(value) for value in vector.tolist()]

    def gather(self, values: Sequence[int]) -> list[list[int]]:
        """Every rank's few 64-bit integers, in rank order; all must give equally many."""
        vector = torch.tensor(values, dtype=torch.int64)
        everyone = [torch.empty_like(vector) for _ in range(self.size)]
        Pending([self._control.allgather([everyone], [vector])], everyone).wait()
        return [other.tolist() for other in everyone]

    def gather_bytes(self, text: bytes) -> list[bytes]:
        """Every rank's bytes, in rank order, of any length."""
        lengths = [length for (length,) in self.gather([len(text)])]
        mine = torch.zeros(max(*lengths, 1), dtype=torch.uint8)
        mine[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else mine[:0]
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        Pending([self._control.allgather([everyone], [mine])], everyone).wait()
        pairs = zip(everyone, lengths, strict=True)
        return [other[:length].numpy().tobytes() for other, length in pairs]

    def sum(self, data: Tensor) -> None:
        """Plain all-reduce in place: fast, and in whatever order the library likes."""
        Pending([self._data.allreduce([data], dist.AllreduceOptions())], data).wait()

    def post(self, sends: Iterable[Move], receives: Iterable[Move]) -> Pending:
        """Begin transfers on the group's device. Pairs match by peer and tag, in order.

        On CPU every move goes its own way at once; on CUDA they are one batch, and all ranks must
        post their batches in the same order.
        """
        if self._data is self._control:
            return self.post_host(sends, receives)
        self._data._start_coalescing(self.device)
        held = _post(self._data, sends, receives)
        return Pending([self._data._end_coalescing(self.device)], held)

    def post_host(self, sends: Iterable[Move], receives: Iterable[Move]) -> Pending:
        """The same for data in host memory, whatever the group's device."""
        return _post(self._control, sends, receives)

    def abandon(self) -> None:
        """Never use it again. Its thread may still be in it."""
        _abandoned.append(self)
        if self._data is not self._control:
            self._data.abort()


def _post(group: Any, sends: Iterable[Move], receives: Iterable[Move]) -> Pending:
    works, held = [], []
    try:
        for move in receives:
            works.append(group.recv([move.data], move.peer, move.tag))
            held.append(move.data)
        for move in sends:
            works.append(group.send([move.data], move.peer, move.tag))
            held.append(move.data)
    except RuntimeError as error:
        raise LinkBroken(str(error)) from error
    return Pending(works, held)


def _gloo_options(host: str) -> Any:
    options = Gloo._Options()
    options._timeout = NEVER
    options._devices = [Gloo.create_device(hostname=host)]
    options._threads = 2
    return options


def _nccl(store: Any, rank: int, size: int) -> Any:
    from torch.distributed import ProcessGroupNCCL

    options = ProcessGroupNCCL.Options()
    options._timeout = NEVER
    return ProcessGroupNCCL(store, rank, size, options)
