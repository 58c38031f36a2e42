"""Buffers that forward changes, such as BatchNorm's statistics, kept independent of the ranks.

Every micro-batch of a step starts from the step's value. What it changed is put back afterwards and
travels with its gradients; the step's new value is the mean along the tree of those that changed it, for
integers and float8 the value of the lowest such micro-batch. Unchanged buffers are not touched: averaging
equal values would change bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(slots=True)
class _Buffer:
    owner: nn.Module
    key: str
    tensor: Tensor
    """The object that held the value at the start of the step."""
    value: Tensor
    """A copy of that value."""
    version: int

    @property
    def current(self) -> Tensor | None:
        return self.owner._buffers[self.key]

    def may_have_changed(self, current: Tensor) -> bool:
        """Floating-point buffers always may: torch's batch_norm writes them without counting a version."""
        return current.is_floating_point() or current is not self.tensor or current._version != self.version


class Buffers:
    """All buffers of some modules, each once."""

    def __init__(self, modules: Iterable[tuple[str, nn.Module]]) -> None:
        self._found: dict[str, _Buffer] = {}
        seen: set[int] = set()
        for prefix, module in modules:
            for path, owner in module.named_modules(prefix=prefix):
                for key, tensor in owner._buffers.items():
                    if tensor is not None and id(tensor) not in seen:
                        seen.add(id(tensor))
                        self._found[f"{path}.{key}"] = _Buffer(
                            owner, key, tensor, tensor.detach().clone(), tensor._version
                        )

    def begin_step(self) -> None:
        """What the buffers hold now is the step's value. Copies only what may have been written since."""
        for buffer in self._found.values():
            current = buffer.current
            if current is None or not buffer.may_have_changed(current):
                continue
            buffer.tensor = current
            buffer.value = current.detach().clone()
            buffer.version = current._version

    def take_changes(self) -> dict[str, Tensor]:
        """What the micro-batch changed, by name, as copies; the step's values are put back."""
        changed: dict[str, Tensor] = {}
        for name, buffer in self._found.items():
            current = buffer.current
            if current is None or not buffer.may_have_changed(current):
                continue
            same = _equal_bits(current, buffer.value)
            if not same:
                changed[name] = current.detach().clone()
            if not same or current is not buffer.tensor:
                self._put(buffer, buffer.value)
        return changed

    def changed(self) -> str | None:
        """The first buffer, by name, that does not hold the step's value."""
        for name, buffer in self._found.items():
            current = buffer.current
            if current is not None and buffer.may_have_changed(current) and not _equal_bits(current, buffer.value):
                return name
        return None

    def put(self, name: str, value: Tensor) -> None:
        """Set a buffer to the step's new value, which `begin_step` will find."""
        buffer = self._found[name]
        self._put(buffer, value)
        buffer.version -= 1

    def lend(self, prefix: str) -> None:
        """Forward may write into copies of the buffers whose names begin so, and keep them for backward."""
        for buffer in self._below(prefix):
            if buffer.current is not None:
                buffer.owner._buffers[buffer.key] = buffer.tensor.detach().clone()

    def take_lent(self, prefix: str) -> dict[str, Tensor]:
        """What forward has changed in these copies, by name; the buffers themselves are back in their places."""
        changed: dict[str, Tensor] = {}
        for name, buffer in self._found.items():
            if not name.startswith(prefix):
                continue
            lent, buffer.owner._buffers[buffer.key] = buffer.current, buffer.tensor
            if lent is not None and not _equal_bits(lent, buffer.value):
                changed[name] = lent.detach()
        return changed

    def _below(self, prefix: str) -> list[_Buffer]:
        return [buffer for name, buffer in self._found.items() if name.startswith(prefix)]

    def has(self, name: str) -> bool:
        return name in self._found

    def template(self, name: str) -> Tensor:
        return self._found[name].value

    def _put(self, buffer: _Buffer, value: Tensor) -> None:
        with torch.no_grad():
            buffer.tensor.copy_(value)
        buffer.owner._buffers[buffer.key] = buffer.tensor
        buffer.version = buffer.tensor._version


@contextmanager
def kept_buffers(modules: Iterable[nn.Module]) -> Iterator[None]:
    """What forward does to their buffers within it is undone."""
    places = [(part, key) for module in modules for part in module.modules() for key in part._buffers]
    kept = [(part, key, part._buffers[key]) for part, key in places]
    values = [None if tensor is None else tensor.detach().clone() for _, _, tensor in kept]
    try:
        yield
    finally:
        for (part, key, tensor), value in zip(kept, values, strict=True):
            if tensor is not None and value is not None and not _equal_bits(tensor, value):
                with torch.no_grad():
                    tensor.copy_(value)
            part._buffers[key] = tensor


def _equal_bits(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        raise ValueError(
            f"a buffer changed from {other.dtype} {tuple(other.shape)} to {one.dtype} {tuple(one.shape)} "
            "in forward: buffers must keep type and shape; hold growing state outside the module"
        )
    if one.is_floating_point() and not has_mean(one):
        return _bytes(one).equal(_bytes(other))
    if one.is_complex():
        one, other = torch.view_as_real(one.detach().resolve_conj()), torch.view_as_real(other)
    if torch.equal(one, other):
        return not one.is_floating_point() or torch.equal(torch.signbit(one), torch.signbit(other))
    return bool(one.is_floating_point() and _bytes(one).equal(_bytes(other)))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def has_mean(buffer: Tensor) -> bool:
    """Not integers, and not types of one byte, such as float8, for which torch has no arithmetic."""
    return buffer.is_complex() or (buffer.is_floating_point() and buffer.itemsize > 1)
