"""A table of state -> the objects that it was captured from, or equally built ones, in place.

Three phases. Everything is checked and planned; then the objects that judge for themselves get their state
(load_state_dict, set_extra_state), which may refuse; only then are tensors, dicts and optimizers written. So
a mismatch changes nothing. Tensors keep their identity, device and requires_grad wherever one of the right
shape and dtype is already there, and what shared a tensor when captured shares one again.

Where the state is spread over ranks, the objects say what of it is needed: a tensor of theirs that is absent or held
in part (see `snapshot.absent`) stays so, and takes only the bytes that it holds. What else the table has is left alone.

Optimizers are not restored through `Optimizer.load_state_dict`: it casts fp32 state to the dtype of a bf16
parameter.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from snapshot.absent import absent_like, hold_parts, is_absent, parts_of
from snapshot.capture import buffer_places, kind_of, parts_with_extra_state
from snapshot.memory import Place
from snapshot.partial import fillings, not_here
from snapshot.sharded import describe_any, distributed, fill, has_layout, local_of, place_of_any
from snapshot.skeleton import TensorSpec
from snapshot.table import StateTable
from snapshot.tree import DecodeLeaf, Json, decode

_KINDS = ("module", "optimizer", "values", "object")


def load(objects: Mapping[str, object], table: StateTable) -> None:
    """Give the objects the state in the table.

    The objects must be built like the captured ones. Raises ValueError, naming object, field, expected and
    found, if they are not; nothing is changed then. If a load_state_dict of the caller's own objects raises,
    objects of that kind that came before may have changed already.
    """
    structures: dict[str, Any] = dict(table.layout.objects)
    _require_same("objects", sorted(objects), sorted(structures))
    for name, thing in objects.items():
        _require_same(f"{name}: kind", [kind_of(name, thing)], sorted(structures[name]))
    loading = _Loading(table)
    # Parameters are fixed in place, so they choose their tensors first.
    for name, thing in sorted(objects.items(), key=lambda item: (_KINDS.index(kind_of(*item)), item[0])):
        structure = structures[name][kind_of(name, thing)]
        if isinstance(thing, nn.Module):
            _plan_module(loading, name, thing, structure)
        elif isinstance(thing, Optimizer):
            _plan_optimizer(loading, name, thing, structure)
        elif isinstance(thing, dict):
            loading.replace(thing, loading.tree(structure, current=thing))
        else:
            _plan_object(loading, name, thing, structure)
    loading.carry_out()


def _plan_module(loading: "_Loading", name: str, module: nn.Module, structure: Any) -> None:
    parameters = dict(module.named_parameters(remove_duplicate=False))
    stored: list[Any] = structure["parameters"]
    _require_same(f"{name}: parameters", list(parameters), [path for path, _ in stored])
    for path, index in stored:
        loading.overwrite(f"{name}.{path}", index, parameters[path])

    buffers = {path: (part, key, buffer) for path, part, key, buffer in buffer_places(module)}
    stored = structure["buffers"]
    _require_same(f"{name}: buffers", list(buffers), [path for path, _, _ in stored])
    home = next((parameter.device for parameter in parameters.values()), torch.device("cpu"))
    for path, index, _ in stored:
        part, key, buffer = buffers[path]
        _plan_buffer(loading, f"{name}.{path}", index, (part, key, buffer), home)

    extra = dict(parts_with_extra_state(module))
    stored = structure["extra"]
    _require_same(f"{name}: modules with extra state", list(extra), [path for path, _ in stored])
    for path, node in stored:
        loading.call(extra[path].set_extra_state, loading.fresh_tree(node, extra[path].get_extra_state))


def _plan_buffer(
    loading: "_Loading",
    path: str,
    index: int | None,
    place: tuple[nn.Module, str, Tensor | None],
    home: torch.device,
) -> None:
    part, key, buffer = place
    new = None
    if index is not None:
        if buffer is not None and buffer.dtype != loading.source(index).dtype:
            raise loading.misfit(path, index, buffer)
        new = loading.tensor(index, buffer, home if buffer is None else buffer.device)
    if new is not buffer:
        loading.write(lambda: part._buffers.__setitem__(key, new))


def _plan_optimizer(loading: "_Loading", name: str, optimizer: Optimizer, structure: Any) -> None:
    groups: list[Any] = structure["groups"]
    _require_same(f"{name}: param_groups", len(optimizer.param_groups), len(groups))
    for number, (group, stored) in enumerate(zip(optimizer.param_groups, groups, strict=True)):
        path = f"{name} group {number}"
        shapes = [list(parameter.shape) for parameter in group["params"]]
        _require_same(f"{path}: shapes", shapes, [entry["shape"] for entry in stored["parameters"]])
        values = loading.tree(stored["values"], current=group)
        missing = sorted(set(optimizer.defaults) - set(values))
        if missing:
            raise ValueError(f"{path}: expected {sorted(optimizer.defaults)}, the table lacks {missing}")
        for parameter, entry in zip(group["params"], stored["parameters"], strict=True):
            _plan_parameter_state(loading, optimizer, parameter, entry, values)
        loading.replace(group, {"params": group["params"], **values})
    others = {key: value for key, value in optimizer.state.items() if not isinstance(key, Tensor)}
    shared = loading.tree(structure["shared"], current=others)
    loading.write(lambda: [optimizer.state.pop(key) for key in others])
    loading.write(lambda: optimizer.state.update(shared))


def _plan_parameter_state(
    loading: "_Loading", optimizer: Optimizer, parameter: Tensor, entry: Any, values: Mapping[str, Any]
) -> None:
    if entry["state"] is None:
        loading.write(lambda: optimizer.state.pop(parameter, None))
        return
    current = optimizer.state.get(parameter, {})
    # torch keeps "step" in CPU memory unless the kernel reads it, so a state captured on CPU can't tell.
    step_on_device = bool(values.get("capturable") or values.get("fused"))

    def device_for(spec: TensorSpec, _: object) -> torch.device:
        is_step = spec.name.endswith("['step']") and not spec.shape
        beside = spec.device == entry["device"] and (step_on_device or not is_step)
        return parameter.device if beside else torch.device("cpu")

    state = loading.tree(entry["state"], current=current, device_for=device_for, beside=parameter)
    if parameter in optimizer.state:
        loading.replace(current, state)
    else:
        loading.write(lambda: optimizer.state.__setitem__(parameter, state))


def _plan_object(loading: "_Loading", name: str, thing: Any, structure: Json) -> None:
    state = loading.fresh_tree(structure, thing.state_dict)
    if isinstance(thing, LRScheduler | GradScaler):
        # Their load_state_dict takes whatever it is given.
        _require_same(f"{name}: fields", _fields(thing.state_dict()), _fields(state))
    loading.call(thing.load_state_dict, state)


def _fields(state: Mapping[str, Any], prefix: str = "") -> list[str]:
    fields = [prefix + key for key in state]
    for number, inner in enumerate(state.get("_schedulers", ())):
        fields += _fields(inner, f"{prefix}_schedulers[{number}].")
    return sorted(fields)


def _require_same(what: str, expected: Any, found: Any) -> None:
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


class _Loading:
    """Plans every write, then carries them out."""

    def __init__(self, table: StateTable) -> None:
        self._table = table
        self._any_shards = any(spec.shard is not None for spec in table.layout.tensors)
        self._targets: dict[int, Tensor] = {}
        self._claimed: dict[Place, int] = {}
        self._calls: list[Callable[[], object]] = []
        self._copies: list[tuple[Tensor, Tensor]] = []
        self._writes: list[Callable[[], object]] = []

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
            self._copies.extend(fillings(path, target, source))

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
                self._copies.extend(fillings(spec.name, current, source))
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

    def fresh_tree(self, node: Json, current: Callable[[], object]) -> Any:
        """Values whose tensors are all new, for code that may keep them.

        current: gives what there is now, if DTensors have to know on which mesh they are.
        """
        made: dict[int, Tensor] = {}

        def place(index: int, here: object) -> Tensor:
            if index not in made:
                spec = self._table.layout.tensors[index]
                if spec.shard is not None and isinstance(here, Tensor) and not has_layout(here, spec.shard):
                    raise self.misfit(spec.name, index, here)
                if is_absent(self.source(index)):
                    raise not_here(spec.name)
                made[index] = self._new(index, _default_device(spec, None), here)
            return made[index]

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
        for call in self._calls:
            call()
        with torch.no_grad():
            for target, source in self._copies:
                fill(target, source)
        for write in self._writes:
            write()


def leaf_decoder(place: Callable[[int, object], Tensor]) -> DecodeLeaf:
    def leaf(tag: str, payload: Any, current: object) -> object:
        match tag:
            case "tensor":
                return place(payload, current)
            case "array":
                tensor = place(payload, None)
                if is_absent(tensor):
                    raise not_here(f"an array of shape {tuple(tensor.shape)}")
                return tensor.cpu().numpy()
            case "scalar":
                dtype, data = payload
                return np.frombuffer(bytes.fromhex(data), dtype)[0]
            case "size":
                return torch.Size(payload)
            case "dtype":
                return getattr(torch, payload)
            case "device":
                return torch.device(payload)
        raise ValueError(f"unknown tag in a tree: {tag!r}")

    return leaf
