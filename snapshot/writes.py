"""Gives objects a table's state: plans every write, then carries them out. For `snapshot.load`.

A tensor of the table has one target, wherever it stands: a parameter or buffer, or what an optimizer keeps, comes
first, and all other places share it. What an object shares with these has the captured bytes before the object's own
load_state_dict sees it, which may copy it; they are put back if one of these refuses.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from snapshot.absent import absent_like, hold_parts, is_absent, parts_of
from snapshot.memory import Place, dtype_named
from snapshot.partial import fillings, not_here
from snapshot.sharded import describe_any, distributed, fill, has_layout, local_of, place_of_any
from snapshot.skeleton import TensorSpec
from snapshot.table import StateTable
from snapshot.tree import DecodeLeaf, Json, decode


def require_same(what: str, expected: Any, found: Any) -> None:
    if expected == found:
        return
    if isinstance(expected, list) and all(isinstance(item, str) for item in expected + found):
        absent, strange = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
        if absent or strange:
            raise ValueError(f"{what}: the table lacks {absent} and has, not expected, {strange}")
    raise ValueError(f"{what}: expected {expected}, found {found} in the table")


def _default_device(spec: TensorSpec, current: object) -> torch.device:
    """Where a tensor stands now, or else the kind of device that the sender had it on, if there is one."""
    if isinstance(current, Tensor):
        return current.device
    there = spec.device == "cpu" or (spec.device == "cuda" and torch.cuda.is_available())
    return torch.empty(0, device=spec.device).device if there else torch.device("cpu")


class Loading:
    """Plans every write, then carries them out."""

    def __init__(self, table: StateTable) -> None:
        self._table = table
        self.parameters: dict[int, Tensor] = {}
        """Those of the modules, by the number of what they take."""
        self._any_shards = any(spec.shard is not None for spec in table.layout.tensors)
        self._targets: dict[int, Tensor] = {}
        self._claimed: dict[Place, int] = {}
        self._calls: list[Callable[[], object]] = []
        self._copies: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._early: set[int] = set()
        self._writes: list[Callable[[], object]] = []

    def number_of(self, tensor: Tensor) -> int | None:
        """Of what it takes, if that is planned, and it is there already."""
        return self._claimed.get(place_of_any(tensor))

    def name_of(self, index: int) -> str:
        return self._table.layout.tensors[index].name

    def source(self, index: int) -> Tensor:
        return self._table.tensors[index]

    def misfit(self, path: str, index: int, target: Tensor) -> ValueError:
        found = describe_any(self.source(index), self._table.layout.tensors[index].shard)
        return ValueError(f"{path}: expected {describe_any(target)}, found {found} in the table")

    def overwrite(self, path: str, index: int, target: Tensor) -> None:
        """This very tensor takes the stored one's elements."""
        source, known = self.source(index), self._targets.get(index)
        spec, part = self._table.layout.tensors[index], local_of(target)
        if (part.shape, part.dtype) != (source.shape, source.dtype) or not has_layout(target, spec.shard):
            raise self.misfit(path, index, target)
        if known is not None and place_of_any(known) != place_of_any(target):
            raise ValueError(f"{path}: expected a tensor of its own, found it tied to {spec.name} in the table")
        owner = self._claimed.setdefault(place_of_any(target), index)
        if owner != index:
            tied = self._table.layout.tensors[owner].name
            raise ValueError(f"{path}: expected it tied to {tied}, found a tensor of its own in the table")
        if known is None:
            self._targets[index] = target
            self._copies[index] = list(fillings(path, target, source))

    def tensor(self, index: int, current: object, device: torch.device, beside: object = None) -> Tensor:
        """The tensor that takes the stored one's place: the current one if it fits, else a new one.

        beside: on its mesh a new DTensor is, if none stands here.
        """
        source, known, spec = self.source(index), self._targets.get(index), self._table.layout.tensors[index]
        if isinstance(current, Tensor):
            if not has_layout(current, spec.shard):
                raise self.misfit(spec.name, index, current)
            place, part = place_of_any(current), local_of(current)
            if known is not None and place_of_any(known) == place:
                return current
            same = (part.shape, part.dtype, part.device) == (source.shape, source.dtype, device)
            overlaps = any(stride == 0 < size - 1 for size, stride in zip(part.shape, part.stride(), strict=True))
            if known is None and same and not overlaps and place not in self._claimed:
                self._claimed[place] = index
                self._targets[index] = current
                self._copies[index] = list(fillings(spec.name, current, source))
                return current
        if known is None:
            known = self._targets[index] = self._new(index, device, current, beside)
        return known

    def _new(self, index: int, device: torch.device, *likes: object) -> Tensor:
        spec, source = self._table.layout.tensors[index], self.source(index)
        if is_absent(source):
            return self._new_absent(index, device)
        local = source.to(device, copy=True)
        return local if spec.shard is None else distributed(local, spec, likes)

    def _new_absent(self, index: int, device: torch.device) -> Tensor:
        """With the parts that the table holds."""
        spec, source = self._table.layout.tensors[index], self.source(index)
        if spec.shard is not None:
            raise not_here(spec.name)
        tensor = absent_like(source, device)
        hold_parts(tensor, [(first, part.to(device, copy=True)) for first, part in parts_of(source)])
        return tensor

    def tree(
        self,
        node: Json,
        *,
        current: object,
        device_for: Callable[[TensorSpec, object], torch.device] = _default_device,
        beside: Tensor | None = None,
    ) -> Any:
        """Values whose tensors are, where they fit, those in `current`. beside: see `tensor`."""

        def place(index: int, here: object) -> Tensor:
            return self.tensor(index, here, device_for(self._table.layout.tensors[index], here), beside)

        return decode(node, leaf=leaf_decoder(place), current=current)

    def shared_tree(self, node: Json, current: Callable[[], object]) -> Any:
        """Values for code that may keep them: their tensors are new, but for those that have a target already.

        To be called when all targets are planned.
        current: gives what there is now, if DTensors have to know on which mesh they are.
        """

        def place(index: int, here: object) -> Tensor:
            spec = self._table.layout.tensors[index]
            if spec.shard is not None and isinstance(here, Tensor) and not has_layout(here, spec.shard):
                raise self.misfit(spec.name, index, here)
            if is_absent(self.source(index)):
                raise not_here(spec.name)
            known = self._targets.get(index)
            if known is None:
                known = self._targets[index] = self._new(index, _default_device(spec, None), here)
            self._early.add(index)
            return known

        return decode(node, leaf=leaf_decoder(place), current=current() if self._any_shards else None)

    def replace(self, target: dict[Any, Any], values: Mapping[Any, Any]) -> None:
        """Later: the dict, itself kept, has these values in this order."""
        self._writes.append(target.clear)
        self._writes.append(lambda: target.update(values))

    def call(self, function: Callable[[Any], object], state: object) -> None:
        self._calls.append(lambda: function(state))

    def write(self, action: Callable[[], object]) -> None:
        self._writes.append(action)

    def carry_out(self) -> None:
        early = [copy for index in sorted(self._early) for copy in self._copies.get(index, ())]
        former = [(target, local_of(target).detach().clone()) for target, _ in early]
        _copy(early)
        try:
            for call in self._calls:
                call()
        except BaseException:  # passed on: whatever it is, nothing is changed
            _copy(former)
            raise
        _copy(copy for copies in self._copies.values() for copy in copies)
        for write in self._writes:
            write()


def _copy(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for target, source in pairs:
            fill(target, source)


def leaf_decoder(place: Callable[[int, object], Tensor]) -> DecodeLeaf:
    def leaf(tag: str, payload: Any, current: object) -> object:
        match tag:
            case "tensor":
                return place(payload, current)
            case "array":
                tensor = place(payload, None)
                if is_absent(tensor):
                    raise not_here(f"an array of shape {tuple(tensor.shape)}")
                return tensor.detach().cpu().numpy()
            case "scalar":
                dtype, data = payload
                return np.frombuffer(bytes.fromhex(data), dtype)[0]
            case "size":
                return torch.Size(payload)
            case "dtype":
                return dtype_named(payload)
            case "device":
                return torch.device(payload)
        raise ValueError(f"unknown tag in a tree: {tag!r}")

    return leaf
