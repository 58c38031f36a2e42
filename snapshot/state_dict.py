"""The tensors of a stored checkpoint, read into a tree of its state, on CPU.

Only what the tree asks for is read, each tensor once however many places have it, straight to where it stays.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from snapshot.files import StorageError
from snapshot.skeleton import TensorSpec
from snapshot.state_tree import Leaf, Tree, filled, places
from snapshot.stored import Stored
from snapshot.table import shaped
from snapshot.writes import leaf_decoder

Progress = Callable[[int, int], None]
"""Called with bytes read and bytes in all."""

BATCH_BYTES = 64 << 20
"""What is read between two words of progress."""

MOST_MAPS = 256
"""Each keeps its file open, and a process may have 1024 of these."""

SMALLEST_MAP_BYTES = 4096
"""A page; what is less lies more densely in memory of its own."""


def read_state(
    stored: Stored, tree: Tree, *, mapped: bool = False, portable: bool = False, progress: Progress | None = None
) -> Tree:
    """The tree with tensors instead of their numbers: those of one number are one tensor.

    mapped: those that lie uncompressed, aligned and in one shard of a local file are maps of it, copied on write. They
        are compared with their checksums first; the files must not be truncated while the tensors are in use.
    portable: arrays come as tensors, and numpy's scalars as Python's.
    Raises RottenCheckpoint, StorageError, and ValueError for what this torch can't express, and for shards.
    """
    numbers = sorted({place.tensor for place in places(tree) if place.tensor is not None})
    tensors = _read(stored, numbers, mapped, progress or (lambda done, total: None))
    decode = leaf_decoder(lambda number, _: tensors[number])

    def value(leaf: Leaf) -> Any:
        found: Any = decode("tensor" if portable and leaf.tag == "array" else leaf.tag, leaf.payload, None)
        return found.item() if portable and leaf.tag == "scalar" else found

    return dict(filled(tree, value))


def _read(stored: Stored, numbers: Sequence[int], mapped: bool, progress: Progress) -> dict[int, Tensor]:
    specs, offsets = stored.skeleton.tensors, stored.skeleton.offsets
    for number in numbers:
        _check_whole(specs[number])
    data = _maps(stored, numbers) if mapped else {}
    done, total = 0, sum(specs[number].nbytes for number in numbers)
    # Maps are compared with their checksums only now: whoever changes a file later than that, changes the map too.
    for batch in _batches(specs, numbers):
        wanted = []
        for number in batch:
            start, length = offsets[number], specs[number].nbytes
            if number in data:
                stored.check(start, start + length)
                continue
            data[number] = torch.empty(length, dtype=torch.uint8)
            wanted.append((start, data[number].numpy().data))
        stored.fill(wanted)
        done += sum(specs[number].nbytes for number in batch)
        progress(done, total)
    return {number: shaped(specs[number], data[number]) for number in numbers}


def _check_whole(spec: TensorSpec) -> None:
    if spec.shard is not None and spec.shape != spec.shard.global_shape:
        raise ValueError(
            f"{spec.name}: is stored as one rank's shard of a DTensor ({spec.shard}); there is no whole of it to load. "
            "Restore it with snapshot.load into a DTensor of the same layout"
        )


def _batches(specs: Sequence[TensorSpec], numbers: Sequence[int]) -> Iterator[list[int]]:
    batch: list[int] = []
    size = 0
    for number in numbers:
        batch.append(number)
        size += specs[number].nbytes
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _maps(stored: Stored, numbers: Sequence[int]) -> dict[int, Tensor]:
    """Bytes of those tensors that can be mapped. As few maps as there can be: each takes an open file."""
    specs, offsets = stored.skeleton.tensors, stored.skeleton.offsets
    maps: list[tuple[int, memoryview]] = []
    large = [number for number in numbers if specs[number].nbytes >= SMALLEST_MAP_BYTES]
    waiting = [large] if large else []
    while waiting and len(maps) < MOST_MAPS:
        run = waiting.pop()
        start, stop = offsets[run[0]], offsets[run[-1] + 1]
        try:
            view = stored.mapped(start, stop)
        except StorageError:  # then they are read, which fails too if it is the storage
            view = None
        if view is not None:
            maps.append((start, view))
        elif len(run) > 1:
            waiting += [run[len(run) // 2 :], run[: len(run) // 2]]
    found = {}
    starts = [start for start, _ in maps]
    for number in large:
        at = bisect_right(starts, offsets[number]) - 1
        if at < 0 or offsets[number + 1] > starts[at] + len(maps[at][1]):
            continue
        begin = offsets[number] - starts[at]
        data = torch.frombuffer(maps[at][1][begin : begin + specs[number].nbytes], dtype=torch.uint8)
        if data.data_ptr() % specs[number].itemsize == 0:
            found[number] = data
    return found
