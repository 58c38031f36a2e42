"""How a tensor lies in memory: where, in which order, and whether it has its bytes for itself. Absent ones lie where
they would if they were present.
"""

from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from snapshot.absent import absent_like, alias, is_absent, parts_of

_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}

Place: TypeAlias = "tuple[object, ...]"


def dtype_named(name: object) -> torch.dtype:
    """By torch's name without "torch."; ValueError for any other. Names come from files and other processes."""
    found = _DTYPES.get(name) if isinstance(name, str) else None
    if found is None:
        raise ValueError(f"torch has no dtype of the name {name!r:.80}")
    return found


def place_of(tensor: Tensor) -> Place:
    """Equal for two tensors that are the same elements in the same memory, or would be if they weren't absent; if
    empty, the same object."""
    if tensor.numel() == 0 or tensor.is_meta:
        return (id(tensor),)
    layout = (tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg())
    return (tensor.device, address_of(tensor), *layout)


def address_of(tensor: Tensor) -> object:
    """Where its first element is; of an absent one, where it would be."""
    if is_absent(tensor):
        return "absent", storage_of(tensor), tensor.storage_offset()
    return tensor.data_ptr()


def storage_of(tensor: Tensor) -> int:
    """Which storage it has, present or not."""
    return int(tensor.untyped_storage()._cdata)


def memory_order(tensor: Tensor) -> tuple[int, ...] | None:
    """The axes from the outermost in memory to the innermost, or None if there are gaps or overlaps."""
    axes = range(tensor.dim())
    if tensor.is_contiguous():
        return tuple(axes)
    # The stride of an axis of size 1 says nothing and is not kept by copies: such axes come first.
    strides = [0 if size == 1 else -stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    order = tuple(sorted(axes, key=lambda axis: (tensor.shape[axis] > 1, strides[axis], axis)))
    wanted = 1
    for axis in reversed(order):  # not permute(order).is_contiguous(), which looks at the storage
        if tensor.shape[axis] > 1 and tensor.stride(axis) != wanted:
            return None
        wanted *= tensor.shape[axis]
    return order


def dense_of(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The tensor itself if it has its bytes for itself, else a copy; and how its axes lie in memory."""
    if is_absent(tensor):
        return _absent_dense_of(tensor)
    dense = tensor.detach().resolve_conj().resolve_neg()
    order = memory_order(dense)
    if order is None:
        dense = dense.clone(memory_format=torch.contiguous_format)
        order = tuple(range(dense.dim()))
    return dense, order


def _absent_dense_of(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """As if it were present: one without memory tells what a copy of it would be like."""
    like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    like = torch._neg_view(like) if tensor.is_neg() else like
    dense, order = dense_of(like.conj() if tensor.is_conj() else like)
    if dense.stride() == tensor.stride() and not tensor.is_neg() and not tensor.is_conj():
        return alias(tensor), order
    assert not parts_of(tensor), f"{describe(tensor)} has gaps in memory, and can't be held in part"
    return absent_like(dense, tensor.device), order


def describe(tensor: Tensor) -> str:
    shape = (
        "no shape yet"
        if isinstance(tensor, UninitializedBuffer | UninitializedParameter)
        else f"shape {tuple(tensor.shape)}"
    )
    return f"{type(tensor).__qualname__}({tensor.dtype}, {shape}, {tensor.layout}, {tensor.device})"
