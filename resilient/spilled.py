"""A list that grows with the steps of a run: its newest items are in memory, all before them in a file without a name,
which ends with the process."""

from __future__ import annotations

import json
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import IO, Any, TypeVar, overload

BLOCK_ITEMS = 1024

Item = TypeVar("Item")


class Spilled(Sequence[Item]):
    """Read like a list; a slice of it is a list. Equal to any sequence of the same items.

    Items are what JSON can say; they are added at the end, dropped from it, and not changed. Where no file can be
    written, all of them stay in memory.
    """

    __hash__ = None  # type: ignore[assignment]

    def __init__(self) -> None:
        self._tail: list[Item] = []
        """What comes after the blocks; after `_spill` fewer than a block."""
        self._blocks: list[tuple[int, int]] = []
        """Of each block in the file where it begins and how many bytes it has."""
        self._file: IO[bytes] | None = None
        self._said = False
        """That no file can be written."""
        self._read: tuple[int, list[Item]] = (-1, [])
        """The block that was read last, by number."""

    def append(self, item: Item) -> None:
        self._tail.append(item)
        if len(self._tail) % BLOCK_ITEMS == 0:
            self._spill()

    def extend(self, items: Sequence[Item]) -> None:
        for item in items:
            self.append(item)

    def truncate(self, length: int) -> None:
        """Keep the first so many."""
        blocks = min(length // BLOCK_ITEMS, len(self._blocks))
        if blocks < len(self._blocks):
            self._tail = self._block(blocks)
            del self._blocks[blocks:]
            self._read = (-1, [])
        del self._tail[length - blocks * BLOCK_ITEMS :]

    def __len__(self) -> int:
        return len(self._blocks) * BLOCK_ITEMS + len(self._tail)

    @overload
    def __getitem__(self, place: int) -> Item: ...

    @overload
    def __getitem__(self, place: slice) -> list[Item]: ...

    def __getitem__(self, place: int | slice) -> Item | list[Item]:
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(len(self)))]
        number, within = divmod(range(len(self))[place], BLOCK_ITEMS)
        if number < len(self._blocks):
            return self._block(number)[within]
        return self._tail[range(len(self))[place] - len(self._blocks) * BLOCK_ITEMS]

    def __iter__(self) -> Iterator[Item]:
        return chain(chain.from_iterable(map(self._block, range(len(self._blocks)))), self._tail)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(one == two for one, two in zip(self, other, strict=True))

    def __add__(self, other: Sequence[Item]) -> list[Item]:
        return [*self, *other]

    def __repr__(self) -> str:
        return repr(list(self))

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[list[Item]]]:
        """Elsewhere it is a list."""
        return list, (list(self),)

    def _spill(self) -> None:
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="resilient-")  # noqa: SIM115  it ends with this object
                weakref.finalize(self, self._file.close)
            while len(self._tail) >= BLOCK_ITEMS:
                data = json.dumps(self._tail[:BLOCK_ITEMS]).encode()
                start = sum(self._blocks[-1]) if self._blocks else 0
                self._file.seek(start)
                self._file.write(data)
                self._file.flush()
                self._blocks.append((start, len(data)))
                del self._tail[:BLOCK_ITEMS]
        except OSError as error:  # they stay here, and the next block tries again
            if not self._said:
                self._said = True
                print(
                    f"resilient: metrics stay in memory, as no file can be written for them ({error}): make room, or "
                    "set TMPDIR to another folder",
                    file=sys.stderr,
                )

    def _block(self, number: int) -> list[Item]:
        if self._read[0] != number:
            assert self._file is not None
            start, size = self._blocks[number]
            self._file.seek(start)
            self._read = (number, json.loads(self._file.read(size)))
        return self._read[1]
