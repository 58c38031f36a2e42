"""A digest of the whole state of this rank, to be compared with the other ranks'.

What may change during forward is read at once, at the boundary; parameters and optimizer state later, beside the
copying of the snapshot. On CPU xxh3 of the bytes; on other devices sums of them, each with its own odd weight, modulo
2^64: one changed element always shows, many almost certainly.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
import xxhash
from torch import Tensor

from snapshot.absent import is_absent
from snapshot.front import Front, bytes_of
from snapshot.skeleton import TensorSpec
from snapshot.table import StateTable

from .core.lane import DIGEST_BITS

DEVICE_CHUNK = 1 << 22
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class StateDigest:
    """Of one state. `begin` has been told what moves; `finish` may take its time."""

    def __init__(self, table: StateTable, calm: list[Tensor], chosen: Collection[int]) -> None:
        """calm: as `readable` gives it. chosen: places of the tensors that count."""
        self._hash = xxhash.xxh3_64(table.skeleton)
        moving = (place for place in range(len(table.tensors)) if place in chosen and place not in table.calm)
        _update(self._hash, [readable(table.tensors[place]) for place in moving])
        self._calm = calm

    def finish(self) -> int:
        """In [0, 2**62). To be called once, before the optimizer may write."""
        _update(self._hash, self._calm)
        return int(self._hash.intdigest() >> 64 - DIGEST_BITS)


class Digests:
    """Makes them, one per captured state; of successive states that share their tensors, most is ready made."""

    def __init__(self) -> None:
        self._front: Front | None = None
        self._ready: list[Tensor] = []

    def begin(self, table: StateTable, compared: Callable[[TensorSpec], bool] = lambda spec: True) -> StateDigest:
        """At a step's boundary; the table must show the state of that moment. compared: which tensors count, of those
        that are here; the same ones on all ranks that are compared."""
        specs = table.layout.tensors
        chosen = {
            place for place, tensor in enumerate(table.tensors) if not is_absent(tensor) and compared(specs[place])
        }
        shared = len(table.front.tensors) if table.front is not None else 0
        if table.front is None or table.front is not self._front:
            self._front, self._ready = table.front, _calm(table, 0, shared, chosen)
        return StateDigest(table, [*self._ready, *_calm(table, shared, len(table.tensors), chosen)], chosen)


def _calm(table: StateTable, start: int, stop: int, chosen: Collection[int]) -> list[Tensor]:
    return [readable(table.tensors[place]) for place in range(start, stop) if place in table.calm and place in chosen]


def readable(tensor: Tensor) -> Tensor:
    """What a digest reads a tensor's bytes from; they are not copied. It follows its storage, should that move, which
    an array of NumPy would not."""
    return bytes_of(tensor) if tensor.device.type == "cpu" else tensor.detach()


def _update(running: Any, readables: Sequence[Tensor]) -> None:
    """A device is waited for once."""
    sums = [weighted_sum(data) for data in readables if data.device.type != "cpu"]
    told = iter(torch.stack(sums).tolist() if sums else ())
    for data in readables:
        running.update(data.numpy() if data.device.type == "cpu" else next(told).to_bytes(8, "little", signed=True))


def weighted_sum(tensor: Tensor) -> Tensor:
    """Of its elements' bits as integers, modulo 2^64, in the order in memory; on its own device."""
    words = bytes_of(tensor).view(_INTEGERS[min(8, tensor.element_size())])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for at in range(0, words.numel(), DEVICE_CHUNK):
        chunk = words[at : at + DEVICE_CHUNK].to(torch.int64)
        weights = torch.arange(2 * at + 1, 2 * (at + chunk.numel()) + 1, 2, device=tensor.device)
        total += (chunk * weights).sum()
    return total
