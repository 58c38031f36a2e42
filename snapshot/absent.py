"""Tensors whose bytes are on other ranks: absent, or held in part.

An absent tensor keeps what it is, down to the very object: shape, strides, dtype, device, and its place in modules
and optimizers. Only its storage is empty. It is partly held if it names parts of itself that are here, as tensors of
their own.

Whoever uses one is stopped. With an empty storage alone that would go wrong: torch 2.13 on CPU raises for matmul,
indexing, `item` and `as_strided`, which look at the storage's length, but `view`, `contiguous` and `numpy` give
something as empty, and whatever runs through elementwise kernels or reductions (add, copy_, clone, zero_, sum,
cat, an optimizer's step) reads or writes at address 0 and ends the process. So an absent tensor is also of another
class while it is absent, in the manner of torch's own UninitializedParameter: all functions but those that ask for
shape, gradient and the like raise AbsentTensorUsed. Code that never asks Python (a graph of autograd, say) is not
stopped, but it holds on to the memory that it saw.
"""

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Part: TypeAlias = tuple[int, Tensor]
"""Its first element, counted in the order in memory, and the elements from there on: 1-D and contiguous."""

_PARTS = "_held_parts"


class AbsentTensorUsed(RuntimeError):
    """The bytes of this tensor are on other ranks, and something here asked for them.

    Code that runs on every rank must leave it alone: a module that this rank does not compute, or its state.
    """


class _Guard:
    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not _is_harmless(func):
            own = next((f" of shape {tuple(each.shape)}" for each in args if type(each) in _PLAIN), "")
            raise AbsentTensorUsed(
                f"{_name_of(func)} of a tensor{own} that is absent here: its bytes are on other ranks"
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({tuple(self.shape)}, {self.dtype}, {self.device})"  # type: ignore[attr-defined]


class AbsentTensor(_Guard, Tensor):  # type: ignore[misc]
    """What a Tensor is while it is absent."""


class AbsentParameter(_Guard, nn.Parameter):  # type: ignore[misc]
    """What a Parameter is while it is absent."""


_GUARDS: dict[type, type] = {Tensor: AbsentTensor, nn.Parameter: AbsentParameter}
_PLAIN: dict[type, type] = {guard: plain for plain, guard in _GUARDS.items()}
PLAIN = frozenset((*_GUARDS, *_PLAIN))
"""The types of plain tensors, present or absent."""

_HARMLESS = {
    getattr(Tensor, name)
    for name in (
        *("dim", "size", "stride", "numel", "nelement", "element_size", "storage_offset", "untyped_storage", "__len__"),
        *("is_contiguous", "is_floating_point", "is_complex", "is_conj", "is_neg", "is_inference", "is_set_to"),
        *("requires_grad_", "register_hook", "register_post_accumulate_grad_hook", "__hash__", "__repr__"),
    )
} | {torch.is_floating_point, torch.is_complex, torch.numel}
_HARMLESS |= {torch.empty_like, torch.full_like, torch.ones_like, torch.zeros_like}
"""These give a tensor that is present, of which nothing but the shape is asked: some optimizers begin with one."""
_ALIASES = frozenset({"data", "T", "mT", "H", "mH", "real", "imag"})
"""Properties that give the bytes another name."""


def _is_harmless(func: Any) -> bool:
    # Reading or writing a property of C. Those of Python have no name.
    is_property = type(func).__name__ == "method-wrapper"
    return getattr(func.__self__, "__name__", "data") not in _ALIASES if is_property else func in _HARMLESS


def _name_of(func: Any) -> str:
    is_property = type(func).__name__ == "method-wrapper"
    return str(getattr(func.__self__ if is_property else func, "__name__", func))


def is_absent(tensor: Tensor) -> bool:
    """Whether it has elements, but no memory: all or some of its bytes are elsewhere."""
    if tensor.layout is not torch.strided or tensor.numel() == 0:
        return False
    return tensor.untyped_storage().nbytes() == 0


def release(*tensors: Tensor) -> None:
    """Let go of their memory, which is free once nobody else uses it; from now on they are absent.

    Nothing happens to those that have no elements, or are absent already. Tensors that share a storage are to be
    released in one call: then they still share one, and are seen to be tied. Views of the former storage stay valid.
    Raises ValueError for anything but a Tensor or a Parameter; of a DTensor give the local tensor.
    """
    shared: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
    for tensor in tensors:
        if tensor.numel() == 0 or type(tensor) in _PLAIN:
            continue
        if type(tensor) not in _GUARDS:
            raise ValueError(
                f"tensor: got a {type(tensor).__qualname__}; only a plain Tensor or Parameter can be absent"
            )
        former, empty = tensor.untyped_storage(), torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        # A new storage: the former can't be emptied once it has been seen by NumPy, or by another process.
        _, storage = shared.setdefault(former._cdata, (former, empty.untyped_storage()))
        empty.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())
        empty = torch._neg_view(empty) if tensor.is_neg() else empty
        tensor.data = empty.conj() if tensor.is_conj() else empty
        storage.resize_(0)  # setting it has given it memory
        tensor.__class__ = _GUARDS[type(tensor)]


def absent(shape: Iterable[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """A new one."""
    tensor = torch.empty(tuple(shape), dtype=dtype, device=device)
    release(tensor)
    return tensor


def absent_like(tensor: Tensor, device: torch.device | None = None) -> Tensor:
    """A new one with shape, strides and dtype of this, which may be absent itself."""
    fresh = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device or tensor.device)
    release(fresh)
    return fresh


def bring(tensor: Tensor) -> None:
    """Give it memory again, uninitialised; parts are no longer held. Nothing happens if it has some.

    Those that share its storage have memory too, and are to be brought as well.
    """
    if is_absent(tensor):
        tensor.untyped_storage().resize_(_storage_bytes(tensor))
    if type(tensor) in _PLAIN:
        tensor.__class__ = _PLAIN[type(tensor)]
    tensor.__dict__.pop(_PARTS, None)


def hold_parts(tensor: Tensor, parts: Iterable[Part]) -> None:
    """From now on these parts of an absent tensor are here, and no others.

    They ascend and do not overlap; each is of the tensor's dtype. They are not copied: who writes into a part changes
    the state.
    """
    held, reached = tuple(parts), 0
    assert is_absent(tensor), "only an absent tensor is held in parts"
    for first, data in held:
        assert data.dim() == 1 and data.is_contiguous() and data.dtype == tensor.dtype, (data.shape, data.dtype)
        assert reached <= first < first + data.numel() <= tensor.numel(), (reached, first, data.numel())
        reached = first + data.numel()
    tensor.__dict__[_PARTS] = held


def parts_of(tensor: Tensor) -> tuple[Part, ...]:
    """Those that are here, of an absent tensor; the same tuple until others are held."""
    found: tuple[Part, ...] = tensor.__dict__.get(_PARTS, ())
    return found


def alias(tensor: Tensor) -> Tensor:
    """As `detach`, also of an absent tensor: another tensor with the same storage and parts."""
    with torch._C.DisableTorchFunctionSubclass():
        other = tensor.detach()
    if is_absent(tensor):
        other.__class__ = AbsentTensor
        hold_parts(other, parts_of(tensor))
    return other


def _storage_bytes(tensor: Tensor) -> int:
    spans = ((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int(tensor.storage_offset() + sum(spans) + 1) * tensor.element_size()
