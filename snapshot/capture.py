"""What the state of a training run is: objects -> a table of named tensors and a skeleton.

    nn.Module           parameters, all buffers (those that state_dict leaves out too), extra state; what is switched on
                        it: requires_grad, training, plain attributes (see `snapshot.attributes`)
    Optimizer           state of each parameter by its place in the groups, which parameter that is, the groups' values
    dict                its values
    anything else       its state_dict(), given back to load_state_dict(): schedulers, scalers, data loaders

No pickle anywhere. Bits survive, and so does aliasing: a tensor that several places share is stored once.
Of a DTensor this rank's shard is stored; see `snapshot.sharded`.
`snapshot.load` is the way back, `snapshot.recapture` the way to do it at every step.

The steady tensors stand first in the table: of all modules, by name, then what the optimizers keep for each
parameter. From one step to the next they are nearly always the same.
"""

from collections.abc import Iterator, Mapping
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from snapshot.absent import PLAIN
from snapshot.attributes import capture_attributes, capture_frozen
from snapshot.memory import Place, address_of, dense_of, describe, place_of
from snapshot.sharded import is_sharded, local_of, place_of_any, shard_of
from snapshot.skeleton import Skeleton, TensorSpec
from snapshot.table import DTYPES, StateTable
from snapshot.tree import Json, encode

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def capture(objects: Mapping[str, object]) -> StateTable:
    """The state of all objects, by name; their order does not matter.

    Raises TypeError, naming path, type and remedy, for a value that can't be stored without pickle.
    """
    return capture_upon(capture_steady(objects), objects)


def capture_upon(steady: "Capturing", objects: Mapping[str, object]) -> StateTable:
    """What the steady tensors belong to, and everything else."""
    capturing = Capturing(steady)
    structures = {name: _capture_object(capturing, name, objects[name]) for name in sorted(objects)}
    return StateTable(
        layout=Skeleton(tensors=tuple(capturing.all_specs()), objects=structures),
        tensors=tuple(capturing.all_tensors()),
        calm=capturing.all_calm(),
    )


def capture_steady(objects: Mapping[str, object]) -> "Capturing":
    """The steady tensors alone."""
    capturing = Capturing()
    for name in sorted(objects):
        module = objects[name]
        if isinstance(module, nn.Module):
            for path, parameter in module.named_parameters(remove_duplicate=False):
                capturing.calmly(f"{name}.{path}", parameter)
            for path, _, _, buffer in buffer_places(module):
                if buffer is not None:
                    capturing.tensor(f"{name}.{path}", buffer)
    for name in sorted(objects):
        optimizer = objects[name]
        if isinstance(optimizer, Optimizer):
            for path, _, state in parameter_states(name, optimizer):
                for key, value in (state or {}).items():
                    if isinstance(value, Tensor):
                        capturing.calmly(f"{path}[{key!r}]", value)
    return capturing


def _capture_object(capturing: "Capturing", name: str, thing: object) -> Json:
    kind = kind_of(name, thing)
    if isinstance(thing, nn.Module):
        return {kind: _capture_module(capturing, name, thing)}
    if isinstance(thing, Optimizer):
        return {kind: _capture_optimizer(capturing, name, thing)}
    return {kind: capture_values(capturing, name, thing)}


def capture_values(capturing: "Capturing", name: str, thing: Any) -> Json:
    """Of what is neither a module nor an optimizer."""
    return capturing.tree(name, dict(thing) if isinstance(thing, dict) else thing.state_dict())


def kind_of(name: str, thing: object) -> str:
    for kind, base in (("module", nn.Module), ("optimizer", Optimizer), ("values", dict)):
        if isinstance(thing, base):
            return kind
    if callable(getattr(thing, "state_dict", None)) and callable(getattr(thing, "load_state_dict", None)):
        return "object"
    raise TypeError(
        f"{name}: {type(thing).__qualname__} has no state that can be captured; give a module, an optimizer, "
        "a dict, or anything with state_dict and load_state_dict"
    )


def _capture_module(capturing: "Capturing", name: str, module: nn.Module) -> Json:
    return {
        "parameters": [
            [path, capturing.calmly(f"{name}.{path}", parameter)]
            for path, parameter in module.named_parameters(remove_duplicate=False)
        ],
        "buffers": [
            [path, None if buffer is None else capturing.tensor(f"{name}.{path}", buffer), is_persistent(part, key)]
            for path, part, key, buffer in buffer_places(module)
        ],
        "extra": [
            [path, capturing.tree(f"{name}.{path} extra state", part.get_extra_state())]
            for path, part in parts_with_extra_state(module)
        ],
        "attributes": capture_attributes(module),
        "frozen": capture_frozen(module),
    }


def buffer_places(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor | None]]:
    """(path, owner, key, buffer) for every place of a buffer, those that are None or not persistent too."""
    for prefix, part in module.named_modules(remove_duplicate=False):
        for key, buffer in part._buffers.items():
            yield (f"{prefix}.{key}" if prefix else key), part, key, buffer


def is_persistent(part: nn.Module, key: str) -> bool:
    """Whether the module's state_dict has this buffer of the part. Nothing else depends on it."""
    return key not in part._non_persistent_buffers_set


def parts_with_extra_state(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, part in module.named_modules():
        if type(part).get_extra_state is not nn.Module.get_extra_state:
            yield path, part


def parameter_states(name: str, optimizer: Optimizer) -> Iterator[tuple[str, Tensor, dict[Any, Any] | None]]:
    """(path, parameter, its state) for each, by its place in the groups."""
    for number, group in enumerate(optimizer.param_groups):
        for position, parameter in enumerate(group["params"]):
            yield f"{name} group {number} parameter {position}", parameter, optimizer.state.get(parameter)


def capture_parameter(
    capturing: "Capturing", path: str, parameter: Tensor, state: dict[Any, Any] | None, number: Json
) -> Json:
    """number: of its tensor; None if that is in no module that is captured."""
    return {
        "parameter": number,
        "shape": list(parameter.shape),
        "device": parameter.device.type,
        "state": None if state is None else capturing.tree(path, dict(state), calm=True),
    }


def capture_group(capturing: "Capturing", name: str, number: int, group: dict[str, Any]) -> Json:
    values = {key: value for key, value in group.items() if key != "params"}
    return capturing.tree(f"{name} group {number}", values)


def capture_shared(capturing: "Capturing", name: str, optimizer: Optimizer) -> Json:
    shared = {key: value for key, value in optimizer.state.items() if not isinstance(key, Tensor)}
    return capturing.tree(f"{name} state", shared)


def _capture_optimizer(capturing: "Capturing", name: str, optimizer: Optimizer) -> Json:
    members = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    for key in optimizer.state:
        if isinstance(key, Tensor) and key not in members:
            raise ValueError(
                f"{name}: state for a tensor of shape {tuple(key.shape)} that is in no param_group; "
                "delete it from optimizer.state"
            )
    states = parameter_states(name, optimizer)
    groups: list[Json] = []
    for number, group in enumerate(optimizer.param_groups):
        parameters: list[Json] = [
            capture_parameter(capturing, *entry, capturing.number_of(entry[1]))
            for entry in islice(states, len(group["params"]))
        ]
        groups.append({"values": capture_group(capturing, name, number, group), "parameters": parameters})
    return {"groups": groups, "shared": capture_shared(capturing, name, optimizer)}


class Capturing:
    """Collects tensors, each once.

    base: those that have their numbers already; they are not collected again.
    """

    def __init__(self, base: "Capturing | None" = None) -> None:
        self.specs: list[TensorSpec] = []
        self.tensors: list[Tensor] = []
        self.originals: list[Tensor] = []  # alive, so that no other takes an empty one's id
        self.index: dict[Place, int] = {}
        """Of every place that was asked for, the base's too."""
        self.calm: set[int] = set()
        self._base = base
        self._first = 0 if base is None else len(base.tensors)

    def all_specs(self) -> Iterator[TensorSpec]:
        return chain(self._base.specs if self._base else (), self.specs)

    def all_tensors(self) -> Iterator[Tensor]:
        return chain(self._base.tensors if self._base else (), self.tensors)

    def all_calm(self) -> frozenset[int]:
        return frozenset(chain(self._base.calm if self._base else (), self.calm))

    def tree(self, path: str, value: object, *, calm: bool = False) -> Json:
        return encode(value, path=path, leaf=self._calm_leaf if calm else self._leaf)

    def calmly(self, path: str, tensor: Tensor) -> int:
        """A tensor that only an optimizer's step changes."""
        index = self.tensor(path, tensor)
        base = self._base
        held = base.tensors[index] if base and index < self._first else self.tensors[index - self._first]
        # The table refers to it, and has no copy. Not a DTensor: torch counts no writes to its local tensor, so who
        # copies that while it may change would not find out that it did.
        if not is_sharded(tensor) and address_of(held) == address_of(tensor):
            self.calm.add(index)
        return index

    def _calm_leaf(self, path: str, value: object) -> tuple[str, Json] | None:
        return ("tensor", self.calmly(path, value)) if isinstance(value, Tensor) else self._leaf(path, value)

    def tensor(self, path: str, tensor: Tensor) -> int:
        plain = type(tensor) in PLAIN and tensor.layout is torch.strided
        if not plain and is_sharded(tensor):
            return self._shard(path, tensor)
        if not plain or tensor.is_meta or _dtype_name(tensor.dtype) not in DTYPES:
            raise _refusal(path, tensor)
        return self._number(path, tensor, place_of(tensor))

    def _shard(self, path: str, tensor: "DTensor") -> int:
        local = local_of(tensor)
        plain = type(local) in PLAIN and local.layout is torch.strided
        if not plain or local.is_meta or _dtype_name(local.dtype) not in DTYPES:
            raise _refusal(f"{path}: local tensor", local)
        return self._number(path, tensor, place_of_any(tensor))

    def number_of(self, tensor: Tensor) -> int | None:
        """Of one that was collected before."""
        return self._find(place_of_any(tensor))

    def _find(self, place: Place) -> int | None:
        index = self.index.get(place)
        return self._base.index.get(place) if index is None and self._base is not None else index

    def _number(self, path: str, tensor: Tensor, place: Place) -> int:
        index = self._find(place)
        if index is None:
            index = self._first + len(self.tensors)
            self._add(path, tensor)
            self.originals.append(tensor)
        self.index[place] = index
        return index

    def _add(self, path: str, tensor: Tensor) -> None:
        shard = shard_of(path, tensor) if is_sharded(tensor) else None
        dense, order = dense_of(tensor if shard is None else local_of(tensor))
        self.tensors.append(dense)
        self.specs.append(
            TensorSpec(
                name=path,
                dtype=_dtype_name(dense.dtype),
                itemsize=dense.dtype.itemsize,
                shape=tuple(dense.shape),
                order=order,
                device=dense.device.type,
                shard=shard,
            )
        )

    def _leaf(self, path: str, value: object) -> tuple[str, Json] | None:
        if isinstance(value, Tensor):
            return "tensor", self.tensor(path, value)
        if type(value) is np.ndarray and _is_portable(value.dtype):
            # torch knows only one of two equal types such as long and long long.
            array = value.view(value.dtype.str)
            borrowable = array.flags.writeable and all(stride >= 0 for stride in array.strides)
            return "array", self.tensor(path, torch.from_numpy(array if borrowable else array.copy()))
        if isinstance(value, np.generic) and _is_portable(value.dtype):
            return "scalar", [value.dtype.str, value.tobytes().hex()]
        if type(value) is torch.Size:
            return "size", list(value)
        if isinstance(value, torch.dtype):
            return "dtype", _dtype_name(value)
        if isinstance(value, torch.device):
            return "device", str(value)
        return None


def _is_portable(dtype: np.dtype[Any]) -> bool:
    """Numbers in this machine's byte order; not long double, about which platforms disagree."""
    return dtype.kind in "biufc" and dtype.isnative and dtype.char not in "gG"


def _refusal(path: str, tensor: Tensor) -> TypeError:
    return TypeError(
        f"{path}: {describe(tensor)} can't be captured; only dense, plain tensors in memory can. "
        "Lazy modules need a forward first, meta tensors to_empty, sparse ones to_dense"
    )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
