"""What the state of a training run is: objects -> a table of named tensors and a skeleton.

    nn.Module           parameters, all buffers (those that state_dict leaves out too), extra state
    Optimizer           state of each parameter by its place in the groups, and the groups' values
    dict                its values
    anything else       its state_dict(), given back to load_state_dict(): schedulers, scalers, data loaders

No pickle anywhere. Bits survive, and so does aliasing: a tensor that several places share is stored once.
`snapshot.load` is the way back.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from snapshot.skeleton import Skeleton, TensorSpec
from snapshot.table import DTYPES, Place, StateTable, describe, memory_order, place_of
from snapshot.tree import Json, encode


def capture(objects: Mapping[str, object]) -> StateTable:
    """The state of all objects, by name; their order does not matter.

    Raises TypeError, naming path, type and remedy, for a value that can't be stored without pickle.
    """
    capturing = _Capturing()
    structures = {name: _capture_object(capturing, name, objects[name]) for name in sorted(objects)}
    layout = Skeleton(tensors=tuple(capturing.specs), objects=structures)
    return StateTable(layout=layout, tensors=tuple(capturing.tensors))


def _capture_object(capturing: "_Capturing", name: str, thing: object) -> Json:
    kind = kind_of(name, thing)
    if isinstance(thing, nn.Module):
        return {kind: _capture_module(capturing, name, thing)}
    if isinstance(thing, Optimizer):
        return {kind: _capture_optimizer(capturing, name, thing)}
    if isinstance(thing, dict):
        return {kind: capturing.tree(name, dict(thing))}
    return {kind: capturing.tree(name, thing.state_dict())}  # type: ignore[attr-defined]


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


def _capture_module(capturing: "_Capturing", name: str, module: nn.Module) -> Json:
    return {
        "parameters": [
            [path, capturing.tensor(f"{name}.{path}", parameter)]
            for path, parameter in module.named_parameters(remove_duplicate=False)
        ],
        "buffers": [
            [path, None if buffer is None else capturing.tensor(f"{name}.{path}", buffer)]
            for path, _, _, buffer in buffer_places(module)
        ],
        "extra": [
            [path, capturing.tree(f"{name}.{path} extra state", part.get_extra_state())]
            for path, part in parts_with_extra_state(module)
        ],
    }


def buffer_places(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor | None]]:
    """(path, owner, key, buffer) for every place of a buffer, those that are None or not persistent too."""
    for prefix, part in module.named_modules(remove_duplicate=False):
        for key, buffer in part._buffers.items():
            yield (f"{prefix}.{key}" if prefix else key), part, key, buffer


def parts_with_extra_state(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, part in module.named_modules():
        if type(part).get_extra_state is not nn.Module.get_extra_state:
            yield path, part


def _capture_optimizer(capturing: "_Capturing", name: str, optimizer: Optimizer) -> Json:
    groups: list[Json] = []
    members: set[Tensor] = set()
    for number, group in enumerate(optimizer.param_groups):
        members.update(group["params"])
        parameters: list[Json] = []
        for position, parameter in enumerate(group["params"]):
            state = optimizer.state.get(parameter)
            path = f"{name} group {number} parameter {position}"
            parameters.append(
                {
                    "shape": list(parameter.shape),
                    "device": parameter.device.type,
                    "state": None if state is None else capturing.tree(path, dict(state)),
                }
            )
        values = {key: value for key, value in group.items() if key != "params"}
        groups.append({"values": capturing.tree(f"{name} group {number}", values), "parameters": parameters})
    for key in optimizer.state:
        if isinstance(key, Tensor) and key not in members:
            raise ValueError(
                f"{name}: state for a tensor of shape {tuple(key.shape)} that is in no param_group; "
                "delete it from optimizer.state"
            )
    shared = {key: value for key, value in optimizer.state.items() if not isinstance(key, Tensor)}
    return {"groups": groups, "shared": capturing.tree(f"{name} state", shared)}


class _Capturing:
    """Collects tensors, each once."""

    def __init__(self) -> None:
        self.specs: list[TensorSpec] = []
        self.tensors: list[Tensor] = []
        self._index: dict[Place, int] = {}
        self._originals: list[Tensor] = []  # alive, so that no other takes an empty one's id

    def tree(self, path: str, value: object) -> Json:
        return encode(value, path=path, leaf=self._leaf)

    def tensor(self, path: str, tensor: Tensor) -> int:
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
        if not plain or tensor.is_meta or _dtype_name(tensor.dtype) not in DTYPES:
            raise TypeError(
                f"{path}: {describe(tensor)} can't be captured; only dense, plain tensors in memory can. "
                "Lazy modules need a forward first, meta tensors to_empty, sparse ones to_dense"
            )
        place = place_of(tensor)
        index = self._index.get(place)
        if index is None:
            index = self._index[place] = len(self.tensors)
            self._originals.append(tensor)
            self._add(path, tensor)
        return index

    def _add(self, path: str, tensor: Tensor) -> None:
        dense = tensor.detach().resolve_conj().resolve_neg()
        order = memory_order(dense)
        if order is None:
            dense = dense.clone(memory_format=torch.contiguous_format)
            order = tuple(range(dense.dim()))
        self.tensors.append(dense)
        self.specs.append(
            TensorSpec(
                name=path,
                dtype=_dtype_name(dense.dtype),
                itemsize=dense.dtype.itemsize,
                shape=tuple(dense.shape),
                order=order,
                device=dense.device.type,
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


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
