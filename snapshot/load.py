"""A table of state -> the objects that it was captured from, or equally built ones, in place.

Three phases. Everything is checked and planned; then the objects that judge for themselves get their state
(load_state_dict, set_extra_state), which may refuse; only then are tensors, dicts and optimizers written. So
a mismatch changes nothing. Tensors keep their identity and device wherever one of the right shape and dtype is
already there, and what shared a tensor when captured shares one again.

Where the state is spread over ranks, the objects say what of it is needed: a tensor of theirs that is absent or held
in part (see `snapshot.absent`) stays so, and takes only the bytes that it holds. What else the table has is left alone.

An optimizer has as many groups as when captured again, of the very parameters of the modules: groups are added and
removed. Optimizers are not restored through `Optimizer.load_state_dict`: it casts fp32 state to the dtype of a bf16
parameter.
"""

from collections.abc import Mapping
from functools import partial
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from snapshot.attributes import restorers
from snapshot.capture import buffer_places, kind_of, parts_with_extra_state
from snapshot.skeleton import TensorSpec
from snapshot.table import StateTable
from snapshot.tree import Json
from snapshot.writes import Loading, require_same

_KINDS = ("module", "optimizer", "values", "object")


def load(objects: Mapping[str, object], table: StateTable) -> None:
    """Give the objects the state in the table.

    The objects must be built like the captured ones. Raises ValueError, naming object, field, expected and
    found, if they are not; nothing is changed then. If a load_state_dict of the caller's own objects raises,
    objects of that kind that came before may have changed already.
    """
    structures: dict[str, Any] = dict(table.layout.objects)
    require_same("objects", sorted(objects), sorted(structures))
    for name, thing in objects.items():
        require_same(f"{name}: kind", [kind_of(name, thing)], sorted(structures[name]))
    loading = Loading(table)
    # Parameters are fixed in place, so they choose their tensors first.
    for name, thing in sorted(objects.items(), key=lambda item: (_KINDS.index(kind_of(*item)), item[0])):
        structure = structures[name][kind_of(name, thing)]
        if isinstance(thing, nn.Module):
            _plan_module(loading, name, thing, structure)
        elif isinstance(thing, Optimizer):
            _plan_optimizer(loading, name, thing, structure)
        elif isinstance(thing, dict):
            loading.replace(thing, loading.tree(structure, current=thing))
    # Then all tensors that these may share are known.
    for name, thing in sorted(objects.items()):
        structure = structures[name][kind_of(name, thing)]
        if isinstance(thing, nn.Module):
            _plan_extra(loading, name, thing, structure)
        elif not isinstance(thing, Optimizer | dict):
            _plan_object(loading, name, thing, structure)
    loading.carry_out()


def _plan_module(loading: Loading, name: str, module: nn.Module, structure: Any) -> None:
    parameters = dict(module.named_parameters(remove_duplicate=False))
    stored: list[Any] = structure["parameters"]
    require_same(f"{name}: parameters", list(parameters), [path for path, _ in stored])
    for path, index in stored:
        loading.overwrite(f"{name}.{path}", index, parameters[path])
        loading.parameters.setdefault(index, parameters[path])

    buffers = {path: (part, key, buffer) for path, part, key, buffer in buffer_places(module)}
    stored = structure["buffers"]
    require_same(f"{name}: buffers", list(buffers), [path for path, _, _ in stored])
    home = next((parameter.device for parameter in parameters.values()), torch.device("cpu"))
    for path, index, _ in stored:
        part, key, buffer = buffers[path]
        _plan_buffer(loading, f"{name}.{path}", index, (part, key, buffer), home)

    if "attributes" in structure:  # earlier versions left out these two
        parts = dict(module.named_modules())
        require_same(f"{name}: modules", sorted(parts), sorted(path for path, _ in structure["attributes"]))
        for restore in restorers(parts, structure["attributes"]):
            loading.write(restore)
        frozen = set(structure["frozen"])
        for path, parameter in parameters.items():
            loading.write(partial(parameter.requires_grad_, path not in frozen))


def _plan_extra(loading: Loading, name: str, module: nn.Module, structure: Any) -> None:
    extra = dict(parts_with_extra_state(module))
    stored: list[Any] = structure["extra"]
    require_same(f"{name}: modules with extra state", list(extra), [path for path, _ in stored])
    for path, node in stored:
        loading.call(extra[path].set_extra_state, loading.shared_tree(node, extra[path].get_extra_state))


def _plan_buffer(
    loading: Loading,
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


def _plan_optimizer(loading: Loading, name: str, optimizer: Optimizer, structure: Any) -> None:
    former, planned = list(optimizer.param_groups), []
    for number, stored in enumerate(structure["groups"]):
        path, group = f"{name} group {number}", former[number] if number < len(former) else {}
        members = _members(loading, path, group.get("params"), stored["parameters"])
        values = loading.tree(stored["values"], current=group)
        missing = sorted(set(optimizer.defaults) - set(values))
        if missing:
            raise ValueError(f"{path}: expected {sorted(optimizer.defaults)}, the table lacks {missing}")
        for parameter, entry in zip(members, stored["parameters"], strict=True):
            _plan_parameter_state(loading, optimizer, parameter, entry, values)
        planned.append({"params": members, **values})
    kept = {id(parameter) for group in planned for parameter in group["params"]}
    for group in former:
        for parameter in group["params"]:
            if id(parameter) not in kept:
                loading.write(partial(lambda gone: optimizer.state.pop(gone, None), parameter))
    loading.write(lambda: _set_groups(optimizer, former, planned))
    others = {key: value for key, value in optimizer.state.items() if not isinstance(key, Tensor)}
    shared = loading.tree(structure["shared"], current=others)
    loading.write(lambda: [optimizer.state.pop(key, None) for key in others])
    loading.write(lambda: optimizer.state.update(shared))


def _members(loading: Loading, path: str, live: list[Tensor] | None, entries: list[Any]) -> list[Tensor]:
    """A group's parameters as captured. live: those of the group that is there, or None.

    Where nothing says which parameter of a module one was, it is the one in the same place of the group.
    """
    members: list[Tensor] = []
    for place, entry in enumerate(entries):
        number = entry.get("parameter")  # earlier versions left it out
        known = loading.parameters.get(number)
        here = live[place] if live is not None and place < len(live) else None
        taken = None if here is None else loading.number_of(here)
        if known is not None and here is not None and taken is None:
            raise ValueError(
                f"{path}: expected {loading.name_of(number)} at place {place}, found a parameter of shape "
                f"{tuple(here.shape)} that no module here has; build the optimizer over the modules' parameters"
            )
        chosen = here if known is None or taken == number else known
        if chosen is None:
            raise ValueError(
                f"{path}: parameter {place}, of shape {tuple(entry['shape'])}, is of no module here, so it can't be "
                "put into the optimizer again; protect the module that has it, or build the optimizer with it"
            )
        members.append(chosen)
    shapes = [list(parameter.shape) for parameter in members]
    require_same(f"{path}: shapes", shapes, [entry["shape"] for entry in entries])
    return members


def _set_groups(optimizer: Optimizer, former: list[dict[str, Any]], planned: list[dict[str, Any]]) -> None:
    """former: the groups that are there, which are kept, with their lists of parameters, as far as they are wanted."""
    optimizer.param_groups[:] = former[: len(planned)]
    for group, values in zip(former, planned, strict=False):
        members = group["params"]
        if len(members) != len(values["params"]) or not all(map(is_, members, values["params"])):
            members[:] = values["params"]
        group.clear()
        group.update(values | {"params": members})
    for values in planned[len(former) :]:
        # Of the class: on the instance somebody may have put what is to see only the user's calls.
        type(optimizer).add_param_group(optimizer, dict(values))


def _plan_parameter_state(
    loading: Loading, optimizer: Optimizer, parameter: Tensor, entry: Any, values: Mapping[str, Any]
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

    loading.replace(current, loading.tree(entry["state"], current=current, device_for=device_for, beside=parameter))
    loading.write(lambda: optimizer.state.__setitem__(parameter, current))


def _plan_object(loading: Loading, name: str, thing: Any, structure: Json) -> None:
    state = loading.shared_tree(structure, thing.state_dict)
    if isinstance(thing, LRScheduler | GradScaler):
        # Their load_state_dict takes whatever it is given.
        require_same(f"{name}: fields", _fields(thing.state_dict()), _fields(state))
    loading.call(thing.load_state_dict, state)


def _fields(state: Mapping[str, Any], prefix: str = "") -> list[str]:
    fields = [prefix + key for key in state]
    for number, inner in enumerate(state.get("_schedulers", ())):
        fields += _fields(inner, f"{prefix}_schedulers[{number}].")
    return sorted(fields)
