"""Buffers that forward changes, such as BatchNorm's statistics, kept independent of the ranks.

Every micro-batch of a step starts from the step's value. What it changed is put back afterwards and
travels with its gradients; the step's new value is the mean along the tree of those that changed it. Of integers, and
of floats of 8 bits or fewer, which are codes, it is the value of the lowest such micro-batch. Unchanged buffers are not
touched: averaging equal values would change bits.

Which buffers are None, and their shapes, change only between steps: a tensor that appears in a micro-batch has no
former value that the others could start from. Which places there are never changes, nor do types: another process
could not restore them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from .errors import LoopError


@dataclass(slots=True)
class _Buffer:
    places: list[tuple[nn.Module, str]]
    """Several if modules share it."""
    tensor: Tensor | None = None
    """The object that held the value at the start of the step; None if there was none."""
    value: Tensor | None = None
    """A copy of that value."""
    version: int = -1
    held: Tensor | None = None
    """What was put into its places: the object, or a copy that is lent."""

    @property
    def current(self) -> Tensor | None:
        owner, key = self.places[0]
        return owner._buffers.get(key)

    def is_torn(self) -> bool:
        return any(owner._buffers.get(key) is not self.held for owner, key in self.places[1:])

    def may_have_changed(self, current: Tensor) -> bool:
        """Floating-point buffers always may: torch's batch_norm writes them without counting a version."""
        return current.is_floating_point() or current is not self.tensor or current._version != self.version

    def keep(self, current: Tensor | None) -> bool:
        """It is the step's value from now on. Whether it is laid out otherwise than the former one."""
        former = self.value
        self.tensor = self.held = current
        self.value = None if current is None else current.detach().clone()
        self.version = -1 if current is None else current._version
        return former is None or self.value is None or not _alike(former, self.value)

    def hold(self, tensor: Tensor) -> None:
        self.held = tensor
        for owner, key in self.places:
            owner._buffers[key] = tensor

    def put(self, value: Tensor) -> None:
        assert self.tensor is not None, self.places
        with torch.no_grad():
            self.tensor.copy_(value)
        self.hold(self.tensor)
        self.version = self.tensor._version


class Buffers:
    """All buffers of some modules, each once."""

    def __init__(self, modules: Iterable[tuple[str, nn.Module]]) -> None:
        self._modules = tuple(modules)
        self.revision = 0
        """Counts how often buffers were set, became None, or got another shape."""
        self._look()

    def _look(self) -> None:
        self.revision += 1
        self._found: dict[str, _Buffer] = {}
        self._structure = {f"{prefix}.": list(map(_structure, module.modules())) for prefix, module in self._modules}
        self._names: set[str] = set()
        """Of all places."""
        first: dict[int, _Buffer] = {}
        for path, owner in self._owners():
            self._names.update(f"{path}.{key}" for key in owner._buffers)
            for key, tensor in owner._buffers.items():
                if tensor is not None and id(tensor) in first:
                    first[id(tensor)].places.append((owner, key))
                    continue
                self._found[f"{path}.{key}"] = first[id(tensor)] = buffer = _Buffer([(owner, key)])
                buffer.keep(tensor)

    def _owners(self) -> Iterator[tuple[str, nn.Module]]:
        for prefix, module in self._modules:
            yield from module.named_modules(prefix=prefix)

    def _is_other(self, prefix: str) -> bool:
        """Whether modules or places of buffers have come or gone."""
        parts = self._structure[prefix] if prefix else chain.from_iterable(self._structure.values())
        return any(owner._modules != children or tuple(owner._buffers) != keys for owner, children, keys in parts)

    def begin_step(self) -> None:
        """What the buffers hold now is the step's value. Copies only what may have been written since.

        Raises LoopError for what could not be restored in another process, which builds the model as it was at first.
        """
        if self._is_other("") or any(buffer.is_torn() for buffer in self._found.values()):
            former = self._names
            self._look()
            for name in sorted(former ^ self._names):
                raise _unrestorable(name, f"was {'registered' if name in self._names else 'deleted'} during training")
            return
        for name, buffer in self._found.items():
            current, value = buffer.current, buffer.value
            if (current is None and value is None) or (current is not None and not buffer.may_have_changed(current)):
                continue
            if current is not None and value is not None and current.dtype != value.dtype:
                raise _unrestorable(name, f"changed from {value.dtype} to {current.dtype}")
            if buffer.keep(current):
                self.revision += 1

    def take_changes(self) -> dict[str, Tensor]:
        """What the micro-batch changed, by name, as copies; the step's values are put back."""
        changed: dict[str, Tensor] = {}
        suspects = list(self._suspects())
        same_bits = _equal_bits((name, current, value) for name, _, current, value in suspects)
        for (name, buffer, current, value), same in zip(suspects, same_bits, strict=True):
            if not same:
                changed[name] = current.detach().clone()
            if not same or current is not buffer.tensor:
                buffer.put(value)
        return changed

    def _suspects(self) -> Iterator[tuple[str, _Buffer, Tensor, Tensor]]:
        """What may have changed, with what is there now, and the step's value."""
        for name, buffer in self._found.items():
            current, value = buffer.current, buffer.value
            if current is not None and value is not None and buffer.may_have_changed(current):
                yield name, buffer, current, value

    def check_places(self, prefix: str = "") -> None:
        """Raises LoopError if a buffer has come or gone since the step's start. prefix: of a module of its own here."""
        for name, buffer in self._below(prefix).items():
            if (buffer.tensor is None) != (buffer.current is None):
                raise _unsettled(name, *(("None", "a tensor") if buffer.tensor is None else ("a tensor", "gone")))
            if len(buffer.places) > 1 and buffer.is_torn():
                raise _unsettled(name, "the same in several modules", "another in one of them")
        if self._is_other(prefix):
            known = {place for buffer in self._found.values() for place in buffer.places}
            for path, owner in self._owners():
                for key in owner._buffers:
                    if (owner, key) not in known:
                        raise _unsettled(f"{path}.{key}", "not there", "registered")

    def changed(self) -> str | None:
        """The first buffer, by name, that does not hold the step's value."""
        suspects = [(name, current, value) for name, _, current, value in self._suspects()]
        return next((name for (name, *_), same in zip(suspects, _equal_bits(suspects), strict=True) if not same), None)

    def put(self, name: str, value: Tensor) -> None:
        """Set a buffer to the step's new value, which `begin_step` will find."""
        buffer = self._found[name]
        buffer.put(value)
        buffer.version -= 1

    def lend(self, prefix: str) -> None:
        """Forward may write into copies of the buffers whose names begin so, and keep them for backward."""
        for buffer in self._below(prefix).values():
            if buffer.tensor is not None:
                buffer.hold(buffer.tensor.detach().clone())

    def take_lent(self, prefix: str) -> dict[str, Tensor]:
        """What forward has changed in these copies, by name; the buffers themselves are back in their places. Raises
        LoopError if buffers have come or gone."""
        self.check_places(prefix)
        suspects: list[tuple[str, Tensor, Tensor]] = []
        for name, buffer in self._below(prefix).items():
            lent, value = buffer.current, buffer.value
            if lent is None or value is None:
                continue
            assert buffer.tensor is not None, name
            buffer.hold(buffer.tensor)
            suspects.append((name, lent, value))
        pairs = zip(suspects, _equal_bits(suspects), strict=True)
        return {name: lent.detach() for (name, lent, _), same in pairs if not same}

    def _below(self, prefix: str) -> dict[str, _Buffer]:
        if not prefix:
            return self._found
        return {name: buffer for name, buffer in self._found.items() if name.startswith(prefix)}

    def has(self, name: str) -> bool:
        return name in self._found and self._found[name].value is not None

    def template(self, name: str) -> Tensor:
        value = self._found[name].value
        assert value is not None, name
        return value


@contextmanager
def kept_buffers(modules: Iterable[nn.Module]) -> Iterator[None]:
    """What forward does to their buffers within it is undone."""
    places = [(part, key) for module in modules for part in module.modules() for key in part._buffers]
    kept = [(part, key, part._buffers[key]) for part, key in places]
    values = [None if tensor is None else tensor.detach().clone() for _, _, tensor in kept]
    try:
        yield
    finally:
        held = [
            (key, tensor, value)
            for (_, key, tensor), value in zip(kept, values, strict=True)
            if tensor is not None and value is not None
        ]
        with torch.no_grad():
            for (_, tensor, value), same in zip(held, _equal_bits(held), strict=True):
                if not same:
                    tensor.copy_(value)
        for part, key, own in kept:
            part._buffers[key] = own


def _structure(module: nn.Module) -> tuple[nn.Module, dict[str, nn.Module | None], tuple[str, ...]]:
    """With its children, and the names of its buffers."""
    return module, dict(module._modules), tuple(module._buffers)


def _unsettled(name: str, before: str, after: str) -> LoopError:
    return LoopError(
        f"buffer {name} was {before} before a micro-batch, and {after} after it: ranks have micro-batches of their "
        "own, and could not agree on it. Register it before the loop as a tensor of its final shape and type, "
        "torch.zeros(...) say, beside a flag that tells whether it is set: "
        'self.register_buffer("is_set", torch.tensor(False)). Only once per step, behind the loop over its '
        "micro-batches, may one that is None be set, or become None"
    )


def _unrestorable(name: str, what: str) -> LoopError:
    return LoopError(
        f"buffer {name} {what}: a process that takes a lost one's place, or resumes the run, builds the model as it "
        "was before the loop, and could not restore it. Register it before protect with its final type, or as None; "
        "once per step, behind the loop over micro-batches, it may be set, change its shape and become None"
    )


def _equal_bits(pairs: Iterable[tuple[str, Tensor, Tensor]]) -> list[bool]:
    """Of each named pair, whether they are the same. A device is waited for once, whatever their number."""
    found = [_compared(*pair) for pair in pairs]
    asked = [each for each in found if isinstance(each, Tensor)]
    told = iter(torch.stack(asked).tolist() if asked else ())
    return [bool(next(told)) if isinstance(each, Tensor) else each for each in found]


def _compared(name: str, one: Tensor, other: Tensor) -> bool | Tensor:
    """As bytes: not all types can be compared by torch, and -0.0 and NaN are bits too."""
    if not _alike(one, other):
        raise ValueError(
            f"buffer {name} changed from {other.dtype} {tuple(other.shape)} to {one.dtype} {tuple(one.shape)} "
            "in forward: buffers must keep type and shape; hold growing state outside the module"
        )
    if one.device.type == "cpu" or one.device != other.device:
        return _bytes(one).equal(_bytes(other))
    return torch.eq(_bytes(one), _bytes(other)).all()


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype


def _bytes(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    if not tensor.is_contiguous() or tensor.dim() == 0 or tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg().contiguous().reshape(-1)
    return tensor.view(torch.uint8)
