"""Two stored tensors of one dtype and shape, compared element by element, a few MiB at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from snapshot.core.chunks import CHUNK_ELEMENTS
from snapshot.memory import dtype_named
from snapshot.stored import Stored
from snapshot.table import shaped

STEP_ELEMENTS = 4 * CHUNK_ELEMENTS


@dataclass(frozen=True, slots=True, kw_only=True)
class BitDifference:
    """elements: how many there are. bits: of how many the bits differ.

    values: of how many the value differs: not of those that differ in a NaN's payload or in the sign of zero.
    absolute, relative: the largest difference of finite values; relative to the larger of the two. None if there is
        none, or no number for it.
    not_finite: how many differ of which at least one is infinite or NaN.
    """

    elements: int
    bits: int = 0
    values: int = 0
    absolute: float | None = None
    relative: float | None = None
    not_finite: int = 0

    @property
    def only_bits(self) -> bool:
        return self.bits > 0 and self.values == 0

    def __add__(self, other: BitDifference) -> BitDifference:
        return BitDifference(
            elements=self.elements + other.elements,
            bits=self.bits + other.bits,
            values=self.values + other.values,
            absolute=_larger(self.absolute, other.absolute),
            relative=_larger(self.relative, other.relative),
            not_finite=self.not_finite + other.not_finite,
        )


def compare(one: Stored, number: int, other: Stored, other_number: int) -> BitDifference:
    """Raises as `Stored.read`."""
    spec, other_spec = one.skeleton.tensors[number], other.skeleton.tensors[other_number]
    assert (spec.dtype, spec.shape) == (other_spec.dtype, other_spec.shape)
    start, other_start = one.skeleton.offsets[number], other.skeleton.offsets[other_number]
    if spec.order != other_spec.order:  # elements lie in another order: no way around reading all
        whole = shaped(spec, _read(one, start, spec.nbytes)).contiguous().flatten()
        other_whole = shaped(other_spec, _read(other, other_start, spec.nbytes)).contiguous().flatten()
        return differences(whole, other_whole)
    total, step = BitDifference(elements=0), STEP_ELEMENTS * spec.itemsize
    for at in range(0, spec.nbytes, step):
        length = min(step, spec.nbytes - at)
        data, other_data = _read(one, start + at, length), _read(other, other_start + at, length)
        if torch.equal(data, other_data):
            total += BitDifference(elements=length // spec.itemsize)
        else:
            dtype = dtype_named(spec.dtype)
            total += differences(data.view(dtype), other_data.view(dtype))
    return total


def _read(stored: Stored, start: int, length: int) -> Tensor:
    data = torch.empty(length, dtype=torch.uint8)
    stored.read(start, start + length, data.numpy().data)
    return data


def differences(one: Tensor, other: Tensor) -> BitDifference:
    """Of two flat tensors of one dtype and length."""
    if one.numel() == 0:
        return BitDifference(elements=0)
    one_items, other_items = (each.view(torch.uint8).view(-1, each.element_size()) for each in (one, other))
    differ = (one_items != other_items).any(dim=1)
    bits = int(differ.sum())
    if bits == 0:
        return BitDifference(elements=one.numel())
    try:
        left, right = (_numbers(items[differ].flatten().view(one.dtype)) for items in (one_items, other_items))
    except (RuntimeError, NotImplementedError):  # torch has the dtype, but no arithmetic for it
        return BitDifference(elements=one.numel(), bits=bits, values=bits)
    return _of_values(one.numel(), bits, left, right)


def _numbers(tensor: Tensor) -> np.ndarray[Any, Any]:
    if tensor.dtype == torch.bool:
        return tensor.view(torch.uint8).numpy()
    if tensor.is_complex():
        return tensor.to(torch.complex128).numpy()
    return tensor.to(torch.float64).numpy() if tensor.is_floating_point() else tensor.numpy()


def _of_values(elements: int, bits: int, left: np.ndarray[Any, Any], right: np.ndarray[Any, Any]) -> BitDifference:
    unequal = ~((left == right) | (np.isnan(left) & np.isnan(right)))
    left, right = left[unequal], right[unequal]
    finite = np.isfinite(left) & np.isfinite(right)
    absolute = relative = None
    if finite.any():
        left, right = left[finite], right[finite]
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            apart = _apart(left, right)
            most = np.maximum(_size(left), _size(right))
            absolute, relative = _finite(apart.max()), _finite((apart / most).max())
    return BitDifference(
        elements=elements,
        bits=bits,
        values=int(unequal.sum()),
        absolute=absolute,
        relative=relative,
        not_finite=int((~finite).sum()),
    )


def _apart(left: np.ndarray[Any, Any], right: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if left.dtype.kind in "fc":
        return np.asarray(np.abs(left - right))
    # Exact even where a difference needs one bit more than its type has.
    larger, smaller = np.maximum(left, right), np.minimum(left, right)
    wide = np.uint64 if left.dtype.kind == "u" else np.int64
    return np.asarray(larger.astype(wide).view(np.uint64) - smaller.astype(wide).view(np.uint64))


def _size(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.asarray(np.abs(values if values.dtype.kind in "fc" else values.astype(np.float64)))


def _finite(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def _larger(one: float | None, other: float | None) -> float | None:
    return one if other is None else other if one is None else max(one, other)
