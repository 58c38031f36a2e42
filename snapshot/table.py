"""A state as a table: a skeleton, and the tensors that hold its bytes."""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
import xxhash
from torch import Tensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from snapshot.skeleton import Skeleton

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

    skeleton: canonical JSON, see `snapshot.skeleton`. Equal structure and plain values, equal bytes.
    tensors: each once, in the skeleton's order; references into the captured objects, not copies, so the
        table shows later changes until it is read. Only a tensor with gaps or overlaps in memory (a slice, an
        expanded one) is copied, once, by `capture`; it shows no later changes.
    """

    skeleton: bytes
    tensors: tuple[Tensor, ...]
    parsed: Skeleton = field(init=False, repr=False)
    _offsets: tuple[int, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        parsed = Skeleton.from_bytes(self.skeleton)
        if len(parsed.tensors) != len(self.tensors):
            raise ValueError(f"tensors: got {len(self.tensors)}, the skeleton names {len(parsed.tensors)}")
        for spec, tensor in zip(parsed.tensors, self.tensors, strict=True):
            if (tuple(tensor.shape), tensor.dtype) != (spec.shape, DTYPES.get(spec.dtype)):
                raise ValueError(f"tensors: {spec.name} is {describe(tensor)}, the skeleton says {spec}")
        object.__setattr__(self, "parsed", parsed)
        object.__setattr__(self, "_offsets", parsed.offsets)

    @property
    def nbytes(self) -> int:
        return self._offsets[-1]

    def pieces(self, start: int, stop: int) -> Iterator[Tensor]:
        """1-D uint8 views that cover bytes start..stop of the concatenation of all tensors, in order.

        They lie on their tensors' devices. Writing into them writes the table's tensors: so a receiver fills
        a table made by `empty`.
        """
        if not 0 <= start <= stop <= self.nbytes:
            raise ValueError(f"byte range {start}..{stop} is not within 0..{self.nbytes}")
        position = bisect_right(self._offsets, start) - 1
        while start < stop:
            offset, end = self._offsets[position], min(stop, self._offsets[position + 1])
            if start < end:
                view = _bytes_of(self.tensors[position], self.parsed.tensors[position].order)
                yield view[start - offset : end - offset]
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
        tensors = []
        for spec in Skeleton.from_bytes(skeleton).tensors:
            dtype = DTYPES.get(spec.dtype)
            if dtype is None or dtype.itemsize != spec.itemsize:
                raise ValueError(f"skeleton: {spec.name}: dtype {spec.dtype} of {spec.itemsize} bytes")
            flat = torch.empty(spec.nbytes, dtype=torch.uint8).view(dtype)
            in_memory = flat.view([spec.shape[axis] for axis in spec.order])
            tensors.append(in_memory.permute([spec.order.index(axis) for axis in range(len(spec.order))]))
        return cls(skeleton=skeleton, tensors=tuple(tensors))


Place: TypeAlias = "tuple[object, ...]"


def place_of(tensor: Tensor) -> Place:
    """Equal for two tensors that are the same elements in the same memory; for empty ones, the same object."""
    if tensor.numel() == 0 or tensor.is_meta:
        return (id(tensor),)
    layout = (tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg())
    return (tensor.device, tensor.data_ptr(), *layout)


def memory_order(tensor: Tensor) -> tuple[int, ...] | None:
    """The axes from the outermost in memory to the innermost, or None if there are gaps or overlaps."""
    axes = range(tensor.dim())
    if tensor.is_contiguous():
        return tuple(axes)
    order = tuple(sorted(axes, key=lambda axis: (-tensor.stride()[axis], axis)))
    return order if tensor.permute(order).is_contiguous() else None


def describe(tensor: Tensor) -> str:
    shape = (
        "no shape yet"
        if isinstance(tensor, UninitializedBuffer | UninitializedParameter)
        else f"shape {tuple(tensor.shape)}"
    )
    return f"{type(tensor).__qualname__}({tensor.dtype}, {shape}, {tensor.layout}, {tensor.device})"


def _bytes_of(tensor: Tensor, order: tuple[int, ...]) -> Tensor:
    flat = tensor.detach().permute(order).view(-1)  # a view or an error, never a copy
    return flat.view(torch.uint8)
