"""Moving a device's bytes between ranks: by NCCL, or through host memory where NCCL can't.

What is promised for both: `Pending.wait` returns only when the bytes are there, and raises LinkBroken where they
may not be. Nothing here waits under a lock of others: giving a link up only starts what ends it.
"""

from __future__ import annotations

import datetime
import threading
import time
import traceback
from collections.abc import Iterable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from .device import Mark
from .pending import LinkBroken, Move, Pending, Waits, link_errors, post_moves

NEVER = datetime.timedelta(days=10_000)
ABORTS_LIMIT_S = 10.0
"""A formation waits no longer for the memory of links that were given up."""
_LOOK_S = 1e-4

_ending: set[threading.Thread] = set()
"""End links that were given up."""
_unended: list[object] = []
"""What links that could not be ended may still write into."""


class DeviceLink(Protocol):
    def post(self, sends: Iterable[Move], receives: Iterable[Move]) -> Pending: ...

    def sum(self, data: Tensor) -> None: ...

    def give_up(self, held: object) -> None:
        """Never use it again. held: stays referenced as long as anything may be written into it."""


class NcclLink:
    """All transfers of one communicator, in the order in which they are posted."""

    def __init__(self, backend: Any, device: torch.device, waits: Waits) -> None:
        """backend: a ProcessGroupNCCL."""
        self._backend, self._device, self._waits = backend, device, waits
        self._given_up = False
        self._ended = threading.Event()

    @classmethod
    def connect(cls, store: Any, rank: int, size: int, device: torch.device, waits: Waits) -> NcclLink:
        from torch.distributed import ProcessGroupNCCL

        options = ProcessGroupNCCL.Options()
        options._timeout = NEVER
        backend = ProcessGroupNCCL(store, rank, size, options)
        # Else the communicator is made by the first transfer, for which all ranks would have to come, and by the store.
        backend.eager_connect_single_device(device)
        return cls(backend, device, waits)

    def post(self, sends: Iterable[Move], receives: Iterable[Move]) -> Pending:
        """One batch, which needs all its ranks' to be posted in the same order."""
        with link_errors():
            # Of a Backend these take no device, unlike those of a ProcessGroup. An empty batch has no work.
            self._backend._start_coalescing()
            _, held = post_moves(self._backend, sends, receives)
            work = self._backend._end_coalescing()
        return _OnStream(self, [] if work is None else [work], held, self._waits)

    def sum(self, data: Tensor) -> None:
        with link_errors():
            work = self._backend.allreduce([data], dist.AllreduceOptions())
        _OnStream(self, [work], data, self._waits).wait()

    def settle(self) -> None:
        """Until all that this thread's stream waits for has come. Raises LinkBroken if it has not.

        An abort ends transfers as if they had come; but whoever aborts has said so before.
        """
        mark = Mark(self._device)
        with self._waits:
            while not mark.has_come() and not self._given_up:
                self._raise_error()
                time.sleep(_LOOK_S)
        if self._given_up:
            self._ended.wait()
            mark.wait()
            raise LinkBroken("the group was given up")

    def _raise_error(self) -> None:
        get_error = getattr(self._backend, "get_error", None)  # not in every torch; then the link is found silent
        if get_error is not None and (error := get_error()).name != "SUCCESS":
            raise LinkBroken(f"NCCL: {error.name}")

    def give_up(self, held: object) -> None:
        if not self._given_up:
            self._given_up = True
            thread = threading.Thread(target=self._end, args=(held,), name="ending NCCL", daemon=True)
            _ending.add(thread)
            thread.start()

    def _end(self, held: object) -> None:
        """Neither peers nor the network are needed, but NCCL may take seconds. Then the kernels have ended, and with
        the device's other work so have all that write into what is held."""
        try:
            self._backend.abort()
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
        except Exception:  # noqa: BLE001  the thread's edge: where nothing is known to have ended, nothing is freed
            traceback.print_exc()
            _unended.append(held)
        finally:
            self._ended.set()
            _ending.discard(threading.current_thread())


class _OnStream(Pending):
    """Transfers that a device's stream waits for, not the host."""

    __slots__ = ("_link",)

    def __init__(self, link: NcclLink, works: list[Any], held: object, waits: Waits) -> None:
        super().__init__(works, held, waits)
        self._link = link

    def follow(self) -> None:
        super().wait()

    def wait(self) -> None:
        self.follow()
        self._link.settle()


class StagedLink:
    """Device, pinned host memory, gloo, pinned host memory, device: for ranks that share a device, which NCCL refuses.

    Host memory that a broken transfer may still write into stays with the link, which its group keeps for good.
    """

    def __init__(self, control: Any, device: torch.device, waits: Waits) -> None:
        self._control, self._device, self._waits = control, device, waits
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._under_way: dict[int, list[Tensor]] = {}

    def post(self, sends: Iterable[Move], receives: Iterable[Move]) -> Pending:
        targets = list(receives)
        leaving = self._copied_out(list(sends))
        coming = [Move(data=self._room(move.data), peer=move.peer, tag=move.tag) for move in targets]
        held = [move.data for move in (*leaving, *coming)]
        self._under_way[id(held)] = held  # before gloo knows of it, since posting may fail half way
        works, _ = post_moves(self._control, leaving, coming)
        landing = [(move.data, host.data) for move, host in zip(targets, coming, strict=True)]
        return _Staged(self, landing, works, held, self._waits)

    def sum(self, data: Tensor) -> None:
        (move,) = self._copied_out([Move(data=data, peer=0, tag=0)])
        held = [move.data]
        self._under_way[id(held)] = held
        with link_errors():
            works = [self._control.allreduce([move.data], dist.AllreduceOptions())]
        _Staged(self, [(data, move.data)], works, held, self._waits).wait()

    def give_up(self, held: object) -> None:
        """gloo writes into host memory only; what is held is written by the thread that uses the link."""

    def landed(self, held: list[Tensor], landing: list[tuple[Tensor, Tensor]]) -> None:
        """What has come goes on to the device, in this thread's stream."""
        for target, host in landing:
            target.copy_(host, non_blocking=True)
        del self._under_way[id(held)]  # torch uses pinned memory again only when copies from it are done

    def settle(self) -> None:
        Mark(self._device).wait()

    def _copied_out(self, moves: list[Move]) -> list[Move]:
        """On a stream of its own: what others enqueue after this is not waited for."""
        enqueued = Mark(self._device)
        with torch.cuda.stream(self._stream):  # None: does nothing
            enqueued.precede()
            out = [Move(data=self._room(move.data), peer=move.peer, tag=move.tag) for move in moves]
            for move, host in zip(moves, out, strict=True):
                host.data.copy_(move.data, non_blocking=True)
            Mark(self._device).wait()
        return out

    def _room(self, like: Tensor) -> Tensor:
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=self._device.type == "cuda")


class _Staged(Pending):
    """Transfers to and from host memory, whose bytes then go on to the device."""

    __slots__ = ("_landing", "_link")

    def __init__(
        self,
        link: StagedLink,
        landing: list[tuple[Tensor, Tensor]],
        works: list[Any],
        held: list[Tensor],
        waits: Waits,
    ) -> None:
        super().__init__(works, held, waits)
        self._link, self._landing = link, landing

    def follow(self) -> None:
        super().wait()
        assert isinstance(self._held, list)
        self._link.landed(self._held, self._landing)

    def wait(self) -> None:
        self.follow()
        self._link.settle()


def wait_for_ended() -> None:
    """Until links that were given up have let go of the device's memory, which their successor needs; not for ever."""
    until = time.monotonic() + ABORTS_LIMIT_S
    for thread in list(_ending):
        thread.join(max(0.0, until - time.monotonic()))
