"""What the tables of successive steps have in common: their first tensors, and views of them that need not be
made anew at each step.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from snapshot.absent import is_absent
from snapshot.core.chunks import chunk_ends
from snapshot.core.ranges import Ranges, size_of
from snapshot.skeleton import TensorSpec

if TYPE_CHECKING:
    from snapshot.table import StateTable


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FrontShare:
    """Byte ranges of a table's front as 1-D uint8 views, in order. The same object: the same views.

    sizes: bytes of each view.
    calm: (which view, view) of the tensors that only an optimizer's step changes; watched: those tensors, or parts.
    moving: (which view, place, first byte in its tensor) of all others, which `moving_views` makes.
    """

    nbytes: int
    sizes: tuple[int, ...]
    calm: tuple[tuple[int, Tensor], ...]
    watched: tuple[Tensor, ...]
    moving: tuple[tuple[int, int, int], ...]

    def moving_views(self, table: "StateTable") -> list[Tensor]:
        return [table.view(place, begin, self.sizes[which]) for which, place, begin in self.moving]


class Front:
    """What successive tables have in common: their first tensors, of which the calm ones stay the very same.

    A tensor that is not calm may be replaced by one of equal layout; its bytes may be elsewhere in each table.
    """

    def __init__(self, specs: Sequence[TensorSpec], tensors: list[Tensor], calm: frozenset[int]) -> None:
        self.tensors, self.calm = tensors, calm
        self.is_whole = not any(map(is_absent, tensors))
        self.offsets = tuple(accumulate((spec.nbytes for spec in specs), initial=0))
        self.ends = chunk_ends_of(specs)
        self._share: tuple[Ranges, FrontShare] | None = None

    @property
    def nbytes(self) -> int:
        return self.offsets[-1]

    def share(self, table: "StateTable", ranges: Ranges) -> FrontShare:
        """Kept until other ranges are asked for: a rank has the same share in step after step."""
        if self._share is None or self._share[0] != ranges:
            self._share = ranges, self._cut(table, ranges)
        return self._share[1]

    def _cut(self, table: "StateTable", ranges: Ranges) -> FrontShare:
        pieces: list[tuple[int, int, Tensor]] = []
        for start, stop in ranges:
            at = start
            for place, piece in table.numbered_pieces(start, stop):
                pieces.append((place, at - self.offsets[place], piece))
                at += piece.numel()
        numbered = list(enumerate(pieces))
        return FrontShare(
            nbytes=size_of(ranges),
            sizes=tuple(piece.numel() for _, _, piece in pieces),
            calm=tuple((which, piece) for which, (place, _, piece) in numbered if place in self.calm),
            watched=tuple(table.watched(place, piece) for place, _, piece in pieces if place in self.calm),
            moving=tuple((which, place, begin) for which, (place, begin, _) in numbered if place not in self.calm),
        )


def chunk_ends_of(specs: Iterable[TensorSpec]) -> tuple[int, ...]:
    return chunk_ends((spec.nbytes // spec.itemsize, spec.itemsize) for spec in specs)


@dataclass(frozen=True, slots=True, eq=False)
class Targets:
    """Where in a slot the front of a share goes, as long as front and address stay the same."""

    front: FrontShare
    address: int
    calm: list[Tensor]
    sources: list[Tensor]
    """What the calm ones take."""
    moving: list[Tensor]
    from_device: bool

    def fit(self, room: Tensor, front: FrontShare) -> bool:
        return self.front is front and self.address == room.data_ptr()

    @classmethod
    def within(cls, room: Tensor, front: FrontShare) -> "Targets":
        """room: the share's bytes in the slot."""
        views = torch.split(room[: front.nbytes], list(front.sizes)) if front.sizes else ()
        return cls(
            front,
            room.data_ptr(),
            [views[which] for which, _ in front.calm],
            [piece for _, piece in front.calm],
            [views[which] for which, _, _ in front.moving],
            any(piece.is_cuda for _, piece in front.calm),
        )


def bytes_of(tensor: Tensor) -> Tensor:
    # Not view(-1): one element may keep a stride that is not 1, and then has no bytes to view.
    return tensor.detach().as_strided((tensor.numel(),), (1,)).view(torch.uint8)
