"""The skeleton of a state: everything but the bytes of its tensors.

It names each tensor, says where its bytes lie in the concatenation of all, and holds the structure into which
they belong. No torch: keepers read it too.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from snapshot.tree import Json, to_bytes

FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One tensor, stored once however many places refer to it.

    name: the first place that refers to it.
    dtype: torch's name without "torch.", e.g. "bfloat16".
    itemsize: bytes of one element.
    order: axes of `shape` from the outermost in memory to the innermost; (0, 1, ...) is the usual order. The
        bytes are stored in memory order, so that a channels-last tensor needs no copy.
    device: the kind of device that the sender had it on, e.g. "cuda".
    """

    name: str
    dtype: str
    itemsize: int
    shape: tuple[int, ...]
    order: tuple[int, ...]
    device: str

    def __post_init__(self) -> None:
        sizes_fit = all(_is_size(size) for size in (self.itemsize, *self.shape))
        if not sizes_fit or self.itemsize == 0 or self.nbytes >= 1 << 63:
            raise ValueError(f"skeleton: {self.name}: impossible size {self.itemsize} * {self.shape}")
        if sorted(self.order) != list(range(len(self.shape))):
            raise ValueError(f"skeleton: {self.name}: {self.order} is no order of {len(self.shape)} axes")

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
            specs = tuple(
                TensorSpec(**{**spec, "shape": tuple(spec["shape"]), "order": tuple(spec["order"])})
                for spec in node["tensors"]
            )
            skeleton = cls(tensors=specs, objects=dict(node["objects"]))
            canonical = skeleton.to_bytes() == data
        except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
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
    return b",".join(
        to_bytes(
            {
                "name": spec.name,
                "dtype": spec.dtype,
                "itemsize": spec.itemsize,
                "shape": list(spec.shape),
                "order": list(spec.order),
                "device": spec.device,
            }
        )
        for spec in specs
    )


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63
