"""Asking a module or an optimizer whether it still holds the very same tensors, fast.

All keys and values are compared at once, by identity: a few dozen nanoseconds each. What was seen is kept alive,
so an identity is never another's.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, chain
from operator import attrgetter, is_, methodcaller
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from snapshot.absent import is_absent, parts_of
from snapshot.attributes import WatchedAttributes
from snapshot.capture import (
    Capturing,
    capture_group,
    capture_parameter,
    capture_shared,
    parameter_states,
    parts_with_extra_state,
)
from snapshot.memory import storage_of
from snapshot.sharded import identity_of, is_sharded, local_of
from snapshot.tree import Json, to_bytes

_CHILDREN: Callable[[nn.Module], Iterable[Any]] = attrgetter("_parameters", "_modules")
_BUFFERS: Callable[[nn.Module], Any] = attrgetter("_buffers")
_LEFT_OUT: Callable[[nn.Module], Any] = attrgetter("_non_persistent_buffers_set")
_VALUES: Callable[[Any], Iterable[Any]] = methodcaller("values")
_DTYPE: Callable[[Tensor], torch.dtype] = attrgetter("dtype")
_FIXED = frozenset({type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device})
_WALKS = ("modules", "named_modules", "parameters", "named_parameters", "_named_members")


def _same(now: Iterable[object], former: Sequence[object]) -> bool:
    """The very same objects; there are equally many."""
    return all(map(is_, now, former))


class Changed(Exception):
    """It takes a full capture to know what this means."""


class Memory:
    """Tensors, and what memory they were; for a DTensor its local tensor stands.

    Of absent ones that they still are, with the same empty storage, and which parts of them are held: they have a type
    of their own.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        whole = list({id(tensor): tensor for tensor in tensors}.values())
        self._sharded = list(filter(is_sharded, whole))
        self._parts = list(map(identity_of, self._sharded))
        self._absent = [local for local in map(local_of, whole) if is_absent(local)]
        self._kinds, self._held = list(map(type, self._absent)), list(map(parts_of, self._absent))
        self._storages = list(map(storage_of, self._absent))
        present = [tensor for tensor in whole if not is_absent(local_of(tensor))]
        present.extend(part for _, part in chain.from_iterable(self._held))
        self._at = {id(tensor): position for position, tensor in enumerate(present)}
        self._tensors = list(map(local_of, present))
        self._former = [tensor.detach() for tensor in self._tensors]
        self._types, self._dtypes = list(map(type, self._tensors)), list(map(_DTYPE, self._tensors))
        self._addresses = list(map(Tensor.data_ptr, self._tensors))

    def check(self) -> None:
        """Raises Changed unless each is, laid out alike, the same part of the same storage."""
        if not _same(map(type, self._tensors), self._types) or not _same(map(_DTYPE, self._tensors), self._dtypes):
            raise Changed
        if not _same(map(type, self._absent), self._kinds) or not _same(map(parts_of, self._absent), self._held):
            raise Changed
        # One that was brought and released meanwhile has another, and the table's alias the one that was brought.
        if list(map(storage_of, self._absent)) != self._storages:
            raise Changed
        if self._sharded:
            self._check_sharded()
        try:
            same = all(map(Tensor.is_set_to, self._tensors, self._former))
        except RuntimeError as error:  # one of another kind, on the meta device perhaps: a full capture says so
            raise Changed from error
        if not same:
            raise Changed

    def _check_sharded(self) -> None:
        """Raises Changed unless each is still made of the very same local tensor and layout."""
        if not all(map(is_sharded, self._sharded)):
            raise Changed
        now = chain.from_iterable(map(identity_of, self._sharded))
        if not _same(now, list(chain.from_iterable(self._parts))):
            raise Changed

    def check_addresses(self) -> None:
        """Raises Changed if a storage has moved as a whole, as share_memory_ does it."""
        if list(map(Tensor.data_ptr, self._tensors)) != self._addresses:
            raise Changed

    def replace(self, former: Tensor, tensor: Tensor) -> None:
        at = self._at[id(tensor)] = self._at.pop(id(former))
        self._tensors[at], self._former[at], self._addresses[at] = tensor, tensor.detach(), tensor.data_ptr()


class Contents:
    """The very keys and values of some dicts."""

    def __init__(self, dicts: Sequence[Any]) -> None:
        if not all(isinstance(each, dict) for each in dicts):
            raise Changed
        self._sizes, self.keys = list(map(len, dicts)), list(chain.from_iterable(dicts))
        self.values = list(chain.from_iterable(map(_VALUES, dicts)))
        self.starts = list(accumulate(self._sizes, initial=0))

    def dict_of(self, position: int) -> int:
        return bisect_right(self.starts, position) - 1

    def changes(self, dicts: Sequence[Any]) -> list[tuple[int, object, object]]:
        """(position, former, now) of the values that are others now. Raises Changed if keys are."""
        if list(map(len, dicts)) != self._sizes or not _same(chain.from_iterable(dicts), self.keys):
            raise Changed
        if _same(chain.from_iterable(map(_VALUES, dicts)), self.values):
            return []
        now = chain.from_iterable(map(_VALUES, dicts))
        pairs = enumerate(zip(self.values, now, strict=True))
        changes = [(position, former, value) for position, (former, value) in pairs if former is not value]
        for position, _, value in changes:
            self.values[position] = value
        return changes

    def check(self, dicts: Sequence[Any]) -> None:
        if self.changes(dicts):
            raise Changed


class WatchedModule:
    """node: its structure, with the key `module`."""

    def __init__(self, name: str, module: nn.Module, node: Any) -> None:
        self._name, self.thing = name, module
        self._parts = list(module.modules())
        for part in self._parts:
            if any(getattr(type(part), walk) is not getattr(nn.Module, walk) for walk in _WALKS):
                raise Changed  # it has a say of its own about what it holds
        self._types = list(map(type, self._parts))
        self._children = Contents(list(chain.from_iterable(map(_CHILDREN, self._parts))))
        self._buffers = Contents(list(map(_BUFFERS, self._parts)))
        self._left_out = list(map(set, map(_LEFT_OUT, self._parts)))
        self._extra = list(parts_with_extra_state(module))
        self._attributes = WatchedAttributes(module)
        self._structure = node["module"]
        self._buffers_spelled = to_bytes(self._structure["buffers"])
        self._parameters_spelled = to_bytes(self._structure["parameters"])

    def tensors(self) -> Iterator[Tensor]:
        return (value for value in (*self._children.values, *self._buffers.values) if isinstance(value, Tensor))

    def replaced(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Each buffer that is another now. Raises Changed if anything else is."""
        if not _same(map(type, self._parts), self._types):
            raise Changed
        self._children.check(list(chain.from_iterable(map(_CHILDREN, self._parts))))
        if list(map(_LEFT_OUT, self._parts)) != self._left_out:
            raise Changed
        for _, former, buffer in self._buffers.changes(list(map(_BUFFERS, self._parts))):
            if not isinstance(former, Tensor) or not isinstance(buffer, Tensor):
                raise Changed
            yield former, buffer

    def part(self, capturing: Capturing) -> tuple[Json, bytes]:
        """Its structure with the key, and how that is spelled."""
        extra: list[Json] = [
            [path, capturing.tree(f"{self._name}.{path} extra state", part.get_extra_state())]
            for path, part in self._extra
        ]
        flags = self._attributes
        flags.update()
        node: Json = {**self._structure, "attributes": flags.node, "extra": extra, "frozen": flags.frozen}
        return {"module": node}, b'{"module":{"attributes":%b,"buffers":%b,"extra":%b,"frozen":%b,"parameters":%b}}' % (
            flags.spelling,
            self._buffers_spelled,
            to_bytes(extra),
            flags.frozen_spelling,
            self._parameters_spelled,
        )


class WatchedOptimizer:
    """node: its structure, with the key `optimizer`."""

    def __init__(self, name: str, optimizer: Optimizer, node: Any) -> None:
        self._name, self.thing = name, optimizer
        self._group_values = Contents(optimizer.param_groups)
        self._states = Contents([optimizer.state])
        self._values = Contents(self._tensor_states())
        self._sizes, self._members = self._standing()
        places = {id(parameter): place for place, parameter in enumerate(self._members)}
        if len(places) < len(self._members):
            raise Changed  # a parameter that stands twice has one state in two places
        self._owners = [places[id(key)] for key in optimizer.state if isinstance(key, Tensor)]
        self._paths = [path for path, _, _ in parameter_states(name, optimizer)]
        starts = accumulate(self._sizes, initial=0)
        self._groups = [
            _SpelledGroup(first, group) for first, group in zip(starts, node["optimizer"]["groups"], strict=False)
        ]
        self._shared = _Spelled(node["optimizer"]["shared"])
        self._has_shared = len(self._owners) < len(optimizer.state)
        for position, value in enumerate(self._values.values):
            if not isinstance(value, Tensor) and not _is_fixed(value):
                member = self._owners[self._values.dict_of(position)]
                self._group_of(member).open_members.add(member)
        for spelled, group in zip(self._groups, optimizer.param_groups, strict=True):
            spelled.is_open = _is_open(group)

    def _tensor_states(self) -> list[Any]:
        return [state for key, state in self.thing.state.items() if isinstance(key, Tensor)]

    def _standing(self) -> tuple[list[int], list[Tensor]]:
        lists = [group["params"] for group in self.thing.param_groups]
        return list(map(len, lists)), list(chain.from_iterable(lists))

    def _group_of(self, member: int) -> "_SpelledGroup":
        return self._groups[bisect_right(self._groups, member, key=attrgetter("first")) - 1]

    def tensors(self) -> Iterator[Tensor]:
        """The parameters' too: their shapes are part of the structure."""
        return (value for value in chain(self._members, self._values.values) if isinstance(value, Tensor))

    def replaced(self) -> Iterator[tuple[Tensor, Tensor]]:
        """No buffers. Raises Changed if the tensors are not the same, or not in the same places."""
        sizes, members = self._standing()
        if sizes != self._sizes or not _same(members, self._members):
            raise Changed
        for position, _, _ in self._states.changes([self.thing.state]):
            if isinstance(self._states.keys[position], Tensor):
                raise Changed
        for position, former, value in self._values.changes(self._tensor_states()):
            if isinstance(former, Tensor) or not _is_fixed(value):
                raise Changed
            which = self._values.dict_of(position)
            member = self._owners[which]
            path = f"{self._paths[member]}[{self._values.keys[position]!r}]"
            item = position - self._values.starts[which]
            self._group_of(member).change_state(member, item, Capturing().tree(path, value))
        return iter(())

    def part(self, capturing: Capturing) -> tuple[Json, bytes]:
        """Its structure with the key, and how that is spelled. In the order of `capture`, which numbers tensors."""
        changes = self._group_values.changes(self.thing.param_groups)
        changed = {self._group_values.dict_of(position) for position, _, _ in changes}
        for number, group in enumerate(self._groups):
            for member in sorted(group.open_members):
                parameter = self._members[member]
                state = self.thing.state.get(parameter)
                group.change(
                    member, capture_parameter(capturing, self._paths[member], parameter, state, group.number(member))
                )
            if group.is_open or number in changed:
                values = self.thing.param_groups[number]
                group.is_open = _is_open(values)
                group.values = _Spelled(capture_group(capturing, self._name, number, values))
        if self._has_shared:
            self._shared = _Spelled(capture_shared(capturing, self._name, self.thing))
        node: Json = {"optimizer": {"groups": [group.node() for group in self._groups], "shared": self._shared.node}}
        groups = b",".join(group.spelling() for group in self._groups)
        return node, b'{"optimizer":{"groups":[%b],"shared":%b}}' % (groups, self._shared.spelling)


class _Spelled:
    def __init__(self, node: Json) -> None:
        self.node, self.spelling = node, to_bytes(node)


class _SpelledGroup:
    """A group's structure in pieces. Nodes that were given out are not changed, but replaced.

    first: number of its first member, counted through all groups.
    is_open, open_members: in whose values there is something that may change by itself.
    """

    def __init__(self, first: int, node: Any) -> None:
        self.first = first
        self.is_open, self.open_members = False, set[int]()
        self.values = _Spelled(node["values"])
        self._nodes: list[Any] = node["parameters"]
        self._spellings = list(map(to_bytes, self._nodes))
        self._is_fresh = False
        self._joined: bytes | None = None

    def number(self, member: int) -> Json:
        """Of the parameter's tensor, which stays."""
        number: Json = self._nodes[member - self.first]["parameter"]
        return number

    def change(self, member: int, node: Any) -> None:
        if not self._is_fresh:
            self._nodes, self._is_fresh, self._joined = self._nodes.copy(), True, None
        self._nodes[member - self.first], self._spellings[member - self.first] = node, to_bytes(node)

    def change_state(self, member: int, item: int, value: Json) -> None:
        node = self._nodes[member - self.first]
        items = node["state"]["dict"].copy()
        items[item] = [items[item][0], value]
        self.change(member, {**node, "state": {"dict": items}})

    def node(self) -> Json:
        self._is_fresh = False
        return {"values": self.values.node, "parameters": self._nodes}

    def spelling(self) -> bytes:
        if self._joined is None:
            self._joined = b",".join(self._spellings)
        return b'{"parameters":[%b],"values":%b}' % (self._joined, self.values.spelling)


def _is_open(group: dict[str, Any]) -> bool:
    """Whether among its values is one that may change by itself, or a tensor, which wants a number each time."""
    return not all(key == "params" or _is_fixed(value) for key, value in group.items())


def _is_fixed(value: object) -> bool:
    """Of a type whose values can't change without becoming another object."""
    return type(value) in _FIXED or (type(value) is tuple and all(map(_is_fixed, value)))
