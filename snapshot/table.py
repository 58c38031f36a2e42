"""A state as a table: a skeleton, and the tensors that hold its bytes."""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate, islice
from typing import TypeAlias

import torch
import xxhash
from torch import Tensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from snapshot.front import Front, FrontShare, bytes_of, chunk_ends_of
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
        expanded one) is copied, once, by `capture`; it shows no later changes.
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

    def front_share(self, start: int, stop: int) -> FrontShare:
        """The first part of bytes start..stop, ready made; `numbered_pieces` has what follows.

        The part is empty if this table has nothing in common with others.
        """
        if self._front is None or start >= self._front.nbytes:
            return FrontShare(nbytes=0, sizes=(), calm=(), watched=(), moving=())
        return self._front.share(self, start, min(stop, self._front.nbytes))

    def pieces(self, start: int, stop: int) -> Iterator[Tensor]:
        """1-D uint8 views that cover bytes start..stop of the concatenation of all tensors, in order.

        They lie on their tensors' devices. Writing into them writes the table's tensors: so a receiver fills
        a table made by `empty`.
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
            if start < end:
                yield position, bytes_of(self.tensors[position])[start - offset : end - offset]
            start, position = max(start, end), position + 1

    def digest(self) -> str:
        """xxh3_128 over the skeleton and every byte, in hexadecimal. Tensors not in CPU memory are copied."""
        hashed = xxhash.xxh3_128(self.skeleton)
        for piece in self.pieces(0, self.nbytes):
            hashed.update(piece.cpu().numpy().data)
        return hashed.hexdigest()

    @classmethod
    def empty(cls, skeleton: bytes) -> "StateTable":
        """A table on CPU with uninitialised tensors, for a receiver to fill through `pieces`.

        Raises ValueError if the skeleton is not one, or names a dtype that this torch does not have.
        """
        layout = Skeleton.from_bytes(skeleton)
        tensors = []
        for spec in layout.tensors:
            tensors.append(shaped(spec, torch.empty(spec.nbytes, dtype=torch.uint8)))
        return cls(layout=layout, tensors=tuple(tensors))


def still(table: StateTable) -> StateTable:
    """As long as no optimizer steps, it stays what it is: of all that may move meanwhile it has copies."""
    tensors = (
        tensor if place in table.calm else tensor.clone(memory_format=torch.preserve_format)
        for place, tensor in enumerate(table.tensors)
    )
    return StateTable(layout=table.layout, tensors=tuple(tensors), calm=table.calm)


def shaped(spec: TensorSpec, data: Tensor) -> Tensor:
    """The tensor of these bytes, which it shares.

    Raises ValueError if this torch doesn't have its dtype.
    """
    dtype = DTYPES.get(spec.dtype)
    if dtype is None or dtype.itemsize != spec.itemsize:
        raise ValueError(f"skeleton: {spec.name}: dtype {spec.dtype} of {spec.itemsize} bytes")
    in_memory = data.view(dtype).view([spec.shape[axis] for axis in spec.order])
    return in_memory.permute([spec.order.index(axis) for axis in range(len(spec.order))])


Place: TypeAlias = "tuple[object, ...]"


def place_of(tensor: Tensor) -> Place:
    """Equal for two tensors that are the same elements in the same memory; if empty, the same object."""
    if tensor.numel() == 0 or tensor.is_meta:
        return (id(tensor),)
    layout = (tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg())
    return (tensor.device, tensor.data_ptr(), *layout)


def memory_order(tensor: Tensor) -> tuple[int, ...] | None:
    """The axes from the outermost in memory to the innermost, or None if there are gaps or overlaps."""
    axes = range(tensor.dim())
    if tensor.is_contiguous():
        return tuple(axes)
    # The stride of an axis of size 1 says nothing and is not kept by copies: such axes come first.
    strides = [0 if size == 1 else -stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    order = tuple(sorted(axes, key=lambda axis: (tensor.shape[axis] > 1, strides[axis], axis)))
    return order if tensor.permute(order).is_contiguous() else None


def describe(tensor: Tensor) -> str:
    shape = (
        "no shape yet"
        if isinstance(tensor, UninitializedBuffer | UninitializedParameter)
        else f"shape {tuple(tensor.shape)}"
    )
    return f"{type(tensor).__qualname__}({tensor.dtype}, {shape}, {tensor.layout}, {tensor.device})"
