"""The skeleton of a state: everything but the bytes of its tensors.

It names each tensor, says where its bytes lie in the concatenation of all, and holds the structure into which
they belong. No torch: keepers read it too.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any

from snapshot.tree import Json, to_bytes

FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardSpec:
    """Where a tensor lies in a whole of which each rank holds a box.

    offsets: of the box's first element in the whole, per dim. An empty box may lie at the end.
    placements: per mesh axis, "Shard(dim)" or "Replicate()".
    mesh_shape, coordinate: ranks along each mesh axis, and where among them this one stands.
    """

    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    placements: tuple[str, ...]
    mesh_shape: tuple[int, ...]
    coordinate: tuple[int, ...]

    def __post_init__(self) -> None:
        numbers = (*self.global_shape, *self.offsets, *self.mesh_shape, *self.coordinate)
        if not all(_is_size(number) for number in numbers):
            raise ValueError(f"skeleton: impossible size in {self!r}")
        if not len(self.placements) == len(self.mesh_shape) == len(self.coordinate):
            raise ValueError(f"skeleton: not as many placements, mesh axes and coordinates in {self!r}")
        if any(at >= ranks for at, ranks in zip(self.coordinate, self.mesh_shape, strict=True)):
            raise ValueError(f"skeleton: the coordinate is outside of the mesh in {self!r}")
        if not all(type(placement) is str and _PLACEMENT.fullmatch(placement) for placement in self.placements):
            raise ValueError(f"skeleton: unknown placement in {self!r}")
        if any(dim is not None and dim >= len(self.global_shape) for dim in self.dims):
            raise ValueError(f"skeleton: a dim is sharded that is not there in {self!r}")

    @property
    def dims(self) -> tuple[int | None, ...]:
        """Per mesh axis the dim that it shards."""
        found = (_PLACEMENT.fullmatch(placement) for placement in self.placements)
        return tuple(int(match[1]) if match and match[1] else None for match in found)

    def check_box(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises ValueError unless a box of that shape lies within the whole, and spans what nothing shards."""
        if not len(shape) == len(self.offsets) == len(self.global_shape):
            raise ValueError(f"skeleton: {name}: {shape} has not as many dims as {self!r}")
        for dim, (size, offset, whole) in enumerate(zip(shape, self.offsets, self.global_shape, strict=True)):
            if offset + size > whole or (dim not in self.dims and size != whole):
                raise ValueError(f"skeleton: {name}: no box {shape} is in {self!r}")

    def __str__(self) -> str:
        placements = ", ".join(self.placements)
        return f"shape {self.global_shape}, [{placements}] at {self.coordinate} of mesh {self.mesh_shape}"


_PLACEMENT = re.compile(r"Replicate\(\)|Shard\((0|[1-9][0-9]{0,3})\)", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One tensor, stored once however many places refer to it.

    name: the first place that refers to it.
    dtype: torch's name without "torch.", e.g. "bfloat16".
    itemsize: bytes of one element.
    order: axes of `shape` from the outermost in memory to the innermost; (0, 1, ...) is the usual order. The
        bytes are stored in memory order, so that a channels-last tensor needs no copy.
    device: the kind of device that the sender had it on, e.g. "cuda".
    shard: of what it is a part, if it is the sender's shard of a DTensor; `shape` is the shard's.
    """

    name: str
    dtype: str
    itemsize: int
    shape: tuple[int, ...]
    order: tuple[int, ...]
    device: str
    shard: ShardSpec | None = None

    def __post_init__(self) -> None:
        sizes_fit = all(_is_size(size) for size in (self.itemsize, *self.shape))
        if not sizes_fit or self.itemsize == 0 or self.nbytes >= 1 << 63:
            raise ValueError(f"skeleton: {self.name}: impossible size {self.itemsize} * {self.shape}")
        if sorted(self.order) != list(range(len(self.shape))):
            raise ValueError(f"skeleton: {self.name}: {self.order} is no order of {len(self.shape)} axes")
        if self.shard is not None:
            self.shard.check_box(self.name, self.shape)

    @property
    def nbytes(self) -> int:
        return self.itemsize * math.prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Skeleton:
    """tensors: in the order of their bytes. objects: name -> {kind: structure}; see `snapshot.capture`."""

    tensors: tuple[TensorSpec, ...]
    objects: dict[str, Json]

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where each tensor begins in the concatenation of all bytes; one more entry: the total."""
        return tuple(accumulate((spec.nbytes for spec in self.tensors), initial=0))

    def to_bytes(self) -> bytes:
        objects = {name: to_bytes(structure) for name, structure in self.objects.items()}
        return spelled(objects=objects, tensors=spelled_specs(self.tensors))

    @classmethod
    def from_bytes(cls, data: bytes) -> "Skeleton":
        """Raises ValueError for anything that `to_bytes` can't have written."""
        try:
            node: Any = json.loads(data)
            found = node["format"]
            if found != FORMAT:
                raise ValueError(f"skeleton: format {found!r}, this version reads {FORMAT}")
            skeleton = cls(tensors=tuple(map(_spec_of, node["tensors"])), objects=dict(node["objects"]))
            canonical = skeleton.to_bytes() == data
        except (AttributeError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"not a skeleton of a state: {error!r}") from error
        if not canonical:
            raise ValueError("not a skeleton of a state: it is not spelled canonically")
        return skeleton


def spelled(*, objects: Mapping[str, bytes], tensors: bytes) -> bytes:
    """A skeleton from the canonical spellings of its parts, which its user may have kept.

    objects: name -> structure. tensors: `spelled_specs` of all.
    """
    front = b'{"format":%d,"objects":{' % FORMAT
    structures = b",".join(b"%b:%b" % (to_bytes(name), objects[name]) for name in sorted(objects))
    return b"".join((front, structures, b'},"tensors":[', tensors, b"]}"))


def spelled_specs(specs: Iterable[TensorSpec]) -> bytes:
    """One after the other, with commas between."""
    return b",".join(to_bytes(_node_of(spec)) for spec in specs)


def _node_of(spec: TensorSpec) -> Json:
    node: dict[str, Json] = {
        "name": spec.name,
        "dtype": spec.dtype,
        "itemsize": spec.itemsize,
        "shape": list(spec.shape),
        "order": list(spec.order),
        "device": spec.device,
    }
    if spec.shard is not None:  # left out of all others, which are spelled as ever
        node["shard"] = {field: list(getattr(spec.shard, field)) for field in _SHARD_FIELDS}
    return node


_SHARD_FIELDS = tuple(field.name for field in fields(ShardSpec))


def _spec_of(node: Any) -> TensorSpec:
    values = {**node, "shape": tuple(node["shape"]), "order": tuple(node["order"])}
    if "shard" in node:
        values["shard"] = ShardSpec(**{field: tuple(value) for field, value in node["shard"].items()})
    return TensorSpec(**values)


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63
