"""A state as a table: a skeleton, and the tensors that hold its bytes."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, islice, pairwise

import torch
import xxhash
from torch import Tensor

from snapshot.absent import absent_like, hold_parts, is_absent, parts_of
from snapshot.core.digest import state_digest
from snapshot.core.ranges import Ranges, clipped, holds, merged
from snapshot.front import Front, FrontShare, bytes_of, chunk_ends_of
from snapshot.memory import describe, memory_order
from snapshot.skeleton import Skeleton, TensorSpec

# Not the quantized and sub-byte ones, whose bytes torch does not copy.
DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in (
        *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
        *("float16", "bfloat16", "float32", "float64", "complex32", "complex64", "complex128"),
        *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
        "float4_e2m1fn_x2",
    )
    if hasattr(torch, name)
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StateTable:
    """A state: its skeleton, and the tensors that hold its bytes.

    layout: names, shapes and structure. `skeleton` is its spelling; equal structure and plain values, equal
        bytes.
    tensors: each once, in the layout's order; references into the captured objects, not copies, so the
        table shows later changes until it is read. Only a tensor with gaps or overlaps in memory (a slice, an
        expanded one) is copied, once, by `capture`; it shows no later changes. Some may be absent, or held in part
        (see `snapshot.absent`): the rest of the state is on other ranks.
    calm: places of the tensors that only an optimizer's step changes: parameters and optimizer state.
    """

    layout: Skeleton
    tensors: tuple[Tensor, ...]
    calm: frozenset[int] = frozenset()
    skeleton: bytes = field(init=False, repr=False)
    _offsets: tuple[int, ...] = field(init=False, repr=False)
    _front: Front | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        if len(self.layout.tensors) != len(self.tensors):
            raise ValueError(f"tensors: got {len(self.tensors)}, the layout names {len(self.layout.tensors)}")
        for spec, tensor in zip(self.layout.tensors, self.tensors, strict=True):
            if (tuple(tensor.shape), tensor.dtype) != (spec.shape, DTYPES.get(spec.dtype)):
                raise ValueError(f"tensors: {spec.name} is {describe(tensor)}, the layout says {spec}")
            if memory_order(tensor) != spec.order:
                raise ValueError(f"tensors: {spec.name} lies in memory as {tensor.stride()}, not {spec.order}")
        object.__setattr__(self, "skeleton", self.layout.to_bytes())
        object.__setattr__(self, "_offsets", self.layout.offsets)

    @classmethod
    def of(
        cls, front: Front, layout: Skeleton, rest: tuple[Tensor, ...], calm: frozenset[int], skeleton: bytes
    ) -> "StateTable":
        """Unchecked, and fast: the front's tensors, then the rest. `skeleton` is the layout's spelling."""
        table = object.__new__(cls)
        behind = layout.tensors[len(front.tensors) :]
        values = {
            "layout": layout,
            "tensors": (*front.tensors, *rest),
            "calm": calm,
            "skeleton": skeleton,
            "_offsets": (
                *front.offsets,
                *islice(accumulate((s.nbytes for s in behind), initial=front.nbytes), 1, None),
            ),
            "_front": front,
        }
        for name, value in values.items():
            object.__setattr__(table, name, value)
        return table

    @property
    def nbytes(self) -> int:
        return self._offsets[-1]

    def held_ranges(self) -> Ranges:
        """Which bytes of the concatenation are here."""
        return merged(
            (offset + begin, offset + end)
            for tensor, offset in zip(self.tensors, self._offsets, strict=False)
            for begin, end, _ in _spans(tensor)
        )

    def held(self, start: int, stop: int) -> bool:
        """Whether all of bytes start..stop are here."""
        return self.is_whole or holds(self.held_ranges(), start, stop)

    @property
    def is_whole(self) -> bool:
        """Whether all bytes are here."""
        if self._front is None:
            return not any(map(is_absent, self.tensors))
        return self._front.is_whole and not any(map(is_absent, self.tensors[len(self._front.tensors) :]))

    @property
    def front(self) -> Front | None:
        """What this table has in common with those before and after it, if anything."""
        return self._front

    def chunk_ends(self) -> tuple[int, ...]:
        """See `snapshot.core.chunks`."""
        if self._front is None:
            return chunk_ends_of(self.layout.tensors)
        front = self._front
        behind = chunk_ends_of(self.layout.tensors[len(front.tensors) :])
        return (*front.ends, *(front.nbytes + end for end in behind))

    def front_share(self, ranges: Ranges) -> tuple[FrontShare, Ranges]:
        """The first part of these bytes, ready made, and the ranges of what follows, for `numbered_pieces`.

        The part is empty if this table has nothing in common with others.
        """
        edge = 0 if self._front is None else self._front.nbytes
        inside, behind = clipped(ranges, 0, edge), clipped(ranges, edge, self.nbytes)
        if self._front is None or not inside:
            return FrontShare(nbytes=0, sizes=(), calm=(), watched=(), moving=()), behind
        return self._front.share(self, inside), behind

    def pieces(self, start: int, stop: int) -> Iterator[Tensor]:
        """1-D uint8 views that cover bytes start..stop of the concatenation of all tensors, in order.

        They lie on their tensors' devices. Writing into them writes the table's tensors: so a receiver fills
        a table made by `empty`. The caller owes that all of the range is `held`.
        """
        for _, piece in self.numbered_pieces(start, stop):
            yield piece

    def numbered_pieces(self, start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        """As `pieces`, each with the place of its tensor."""
        if not 0 <= start <= stop <= self.nbytes:
            raise ValueError(f"byte range {start}..{stop} is not within 0..{self.nbytes}")
        position = bisect_right(self._offsets, start) - 1
        while start < stop:
            offset, end = self._offsets[position], min(stop, self._offsets[position + 1])
            if start < end and is_absent(self.tensors[position]):
                yield from ((position, piece) for piece in self._bytes_in_parts(position, start - offset, end - offset))
            elif start < end:
                yield position, bytes_of(self.tensors[position])[start - offset : end - offset]
            start, position = max(start, end), position + 1

    def view(self, place: int, start: int, length: int) -> Tensor:
        """These bytes of a tensor, all of it or all in one part that is held."""
        if is_absent(self.tensors[place]):
            return next(self._bytes_in_parts(place, start, start + length))
        return bytes_of(self.tensors[place])[start : start + length]

    def watched(self, place: int, piece: Tensor) -> Tensor:
        """Whose writes are those to a piece of this tensor: what torch counts them for."""
        return piece if is_absent(self.tensors[place]) else self.tensors[place]

    def _bytes_in_parts(self, position: int, start: int, stop: int) -> Iterator[Tensor]:
        """Bytes of a tensor that is held in part."""
        for begin, end, part in _spans(self.tensors[position]):
            if begin <= start < min(end, stop):
                yield bytes_of(part)[start - begin : min(end, stop) - begin]
                start = min(end, stop)
        assert start == stop, f"bytes {start}..{stop} of {self.layout.tensors[position].name} are not held here"

    def digest(self) -> str:
        """See `state_digest`. Tensors not in CPU memory are copied. The caller owes that the table is whole."""
        assert self.is_whole, "a digest takes all bytes of the state; some are not held here"
        return state_digest(self.skeleton, self.chunk_digests(0, self.nbytes))

    def chunk_digests(self, start: int, stop: int) -> bytes:
        """The xxh3_128 of each chunk of bytes start..stop, one after the other. They are whole, and held here."""
        ends = (0, *self.chunk_ends())
        cuts = ends[bisect_left(ends, start) : bisect_right(ends, stop)] if start < stop else ()
        assert start == stop or (cuts[0], cuts[-1]) == (start, stop), f"{start}..{stop} are not whole chunks"
        digests = []
        for begin, end in pairwise(cuts):
            hashed = xxhash.xxh3_128()
            for piece in self.pieces(begin, end):
                hashed.update(piece.cpu().numpy().data)
            digests.append(hashed.digest())
        return b"".join(digests)

    @classmethod
    def empty(cls, skeleton: bytes, ranges: Ranges | None = None) -> "StateTable":
        """A table on CPU with uninitialised tensors, for a receiver to fill through `pieces`.

        ranges: holds only these bytes, of whole elements; None for all.
        Raises ValueError if the skeleton is not one, or names a dtype that this torch does not have.
        """
        layout = Skeleton.from_bytes(skeleton)
        tensors = []
        for spec, offset in zip(layout.tensors, layout.offsets, strict=False):
            tensor = shaped(spec, torch.empty(spec.nbytes, dtype=torch.uint8))
            held = (
                ((offset, offset + spec.nbytes),) if ranges is None else clipped(ranges, offset, offset + spec.nbytes)
            )
            if not holds(held, offset, offset + spec.nbytes):
                tensor = _part_of(tensor, [(start - offset, stop - offset) for start, stop in held])
            tensors.append(tensor)
        return cls(layout=layout, tensors=tuple(tensors))


def _part_of(tensor: Tensor, spans: Sequence[tuple[int, int]]) -> Tensor:
    """One like it of which only these bytes are here, uninitialised."""
    size, parts = tensor.element_size(), []
    for begin, end in spans:
        assert begin % size == end % size == 0, f"bytes {begin}..{end} of {describe(tensor)} are not whole elements"
        parts.append((begin // size, torch.empty((end - begin) // size, dtype=tensor.dtype, device=tensor.device)))
    partial = absent_like(tensor)
    hold_parts(partial, parts)
    return partial


def _spans(tensor: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """The bytes of a tensor that are here, and the tensor that they are all of."""
    if not is_absent(tensor):
        yield 0, tensor.nbytes, tensor
        return
    for first, part in parts_of(tensor):
        yield first * part.element_size(), (first + part.numel()) * part.element_size(), part


def copied(table: StateTable) -> StateTable:
    """The same state in memory of its own, on the CPU. The caller owes that the table is whole."""
    copy = StateTable.empty(table.skeleton)
    for target, source in zip(copy.pieces(0, copy.nbytes), table.pieces(0, table.nbytes), strict=True):
        target.copy_(source)
    return copy


def still(table: StateTable) -> StateTable:
    """As long as no optimizer steps, it stays what it is: of all that may move meanwhile it has copies."""
    tensors = (tensor if place in table.calm else _copied(tensor) for place, tensor in enumerate(table.tensors))
    return StateTable(layout=table.layout, tensors=tuple(tensors), calm=table.calm)


def _copied(tensor: Tensor) -> Tensor:
    if not is_absent(tensor):
        return tensor.clone(memory_format=torch.preserve_format)
    other = absent_like(tensor)
    hold_parts(other, [(first, part.clone()) for first, part in parts_of(tensor)])
    return other


def shaped(spec: TensorSpec, data: Tensor) -> Tensor:
    """The tensor of these bytes, which it shares.

    Raises ValueError if this torch doesn't have its dtype.
    """
    dtype = DTYPES.get(spec.dtype)
    if dtype is None or dtype.itemsize != spec.itemsize:
        raise ValueError(f"skeleton: {spec.name}: dtype {spec.dtype} of {spec.itemsize} bytes")
    in_memory = data.view(dtype).view([spec.shape[axis] for axis in spec.order])
    return in_memory.permute([spec.order.index(axis) for axis in range(len(spec.order))])
