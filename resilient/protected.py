"""What the user gave to `protect`: sorted by kind, and refused where it could not be made exact."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel

from .errors import LoopError
from .pipeline import Pipeline

Kind = TypeVar("Kind")


@dataclass(frozen=True, slots=True, kw_only=True)
class Protected:
    """The protected objects. `objects` has all of them, by the names the user chose."""

    objects: Mapping[str, object]
    modules: tuple[tuple[str, nn.Module], ...]
    optimizers: tuple[tuple[str, Optimizer], ...]
    schedulers: tuple[tuple[str, LRScheduler], ...]
    scalers: tuple[tuple[str, GradScaler], ...]
    parameters: tuple[tuple[str, nn.Parameter], ...]
    """Every parameter that wants a gradient, once, by its first name."""
    frozen: tuple[tuple[str, nn.Parameter], ...]
    """The others, whose gradients would not be reduced."""

    @classmethod
    def of(cls, objects: Mapping[str, object], device: torch.device) -> Protected:
        """Raises ValueError or TypeError, naming the argument, what it is, and what to do."""
        for name, thing in objects.items():
            _refuse(name, thing)
        modules = _of_kind(objects, nn.Module)
        optimizers = _of_kind(objects, Optimizer)
        schedulers = _of_kind(objects, LRScheduler)
        if not modules:
            raise ValueError("protect: no model among its arguments; pass one as protect(model=..., optimizer=...)")
        if not optimizers:
            raise ValueError("protect: no optimizer among its arguments; pass it as protect(model=..., optimizer=...)")
        parameters, frozen = _parameters(modules)
        for name, optimizer in optimizers:
            _check_optimizer(name, optimizer, parameters)
            _check_scheduled(name, optimizer, schedulers)
        _check_device(parameters, device)
        return cls(
            objects=dict(objects),
            modules=modules,
            optimizers=optimizers,
            schedulers=schedulers,
            scalers=_of_kind(objects, GradScaler),
            parameters=parameters,
            frozen=frozen,
        )

    @property
    def trained(self) -> tuple[tuple[str, nn.Module], ...]:
        """Modules whose forward belongs to a micro-batch: an average of weights changes once per step instead."""
        return tuple((name, module) for name, module in self.modules if not isinstance(module, AveragedModel))

    @property
    def in_stages(self) -> bool:
        """Whether ranks may hold different parts of the model."""
        return any(isinstance(module, Pipeline) for _, module in self.modules)

    def check_schedulers(self) -> None:
        """Again when the loop begins. Raises ValueError for a scheduler that was created after protect."""
        for name, optimizer in self.optimizers:
            _check_scheduled(name, optimizer, self.schedulers)

    def groups(self) -> list[list[tuple[dict[str, object], list[Tensor]]]]:
        """Of each optimizer its groups, and which parameters they have."""
        return [
            [(group, list(group["params"])) for group in optimizer.param_groups] for _, optimizer in self.optimizers
        ]

    def set_groups(self, groups: list[list[tuple[dict[str, object], list[Tensor]]]]) -> None:
        for (_, optimizer), former in zip(self.optimizers, groups, strict=True):
            for group, parameters in former:
                group["params"] = parameters
            optimizer.param_groups[:] = [group for group, _ in former]

    @property
    def all_parameters(self) -> Named:
        return (*self.parameters, *self.frozen)

    def check_structure(self) -> None:
        """Raises LoopError if a parameter has come, gone or been replaced since protect, or an optimizer updates one
        that belongs to no protected module."""
        known = {id(parameter) for _, parameter in self.all_parameters}
        now = dict(_named_parameters(self.trained))
        for name, parameter in now.items():
            if id(parameter) not in known:
                raise LoopError(
                    f"parameter {name} is another one than at protect, or new: a process that takes a lost one's place "
                    "could not build it, and its gradient would not be reduced. Build the whole model, and wrap it, "
                    "before the optimizer and protect; let a part that comes later exist from the beginning, frozen by "
                    "requires_grad_(False). DDP and FSDP (fully_shard) are not needed: gradients are reduced here"
                )
        if gone := known - set(map(id, now.values())):
            name = next(name for name, parameter in self.all_parameters if id(parameter) in gone)
            raise LoopError(f"parameter {name} is gone since protect; freeze it by requires_grad_(False) instead")
        for name, optimizer in self.optimizers:
            for group in optimizer.param_groups:
                if not known.issuperset(map(id, group["params"])):
                    raise LoopError(
                        f"{name} updates a parameter that belongs to no module given to protect, so that its gradient "
                        "would not be reduced; pass the module to protect, before the loop"
                    )

    def control_state(self) -> dict[str, object]:
        """Values that must be equal on all ranks: learning rates and the like, scheduler and step counters."""
        values: dict[str, object] = {}
        for name, optimizer in self.optimizers:
            for number, group in enumerate(optimizer.param_groups):
                for key, value in group.items():
                    if key != "params":
                        values[f"{name}.param_groups[{number}].{key}"] = _plain(value)
            for place, state in enumerate(optimizer.state.values() if not self.in_stages else ()):
                counter = state.get("step")
                if counter is not None and (not isinstance(counter, Tensor) or counter.device.type == "cpu"):
                    values[f"{name}.state[{place}].step"] = float(counter)
        for name, scheduler in self.schedulers:
            for key, value in scheduler.state_dict().items():
                values[f"{name}.{key}"] = _plain(value)
        return values


def _of_kind(objects: Mapping[str, object], kind: type[Kind]) -> tuple[tuple[str, Kind], ...]:
    return tuple((name, thing) for name, thing in objects.items() if isinstance(thing, kind))


def _refuse(name: str, thing: object) -> None:
    for part in thing.modules() if isinstance(thing, nn.Module) else ():
        if _reduces_by_itself(part):
            raise ValueError(
                f"protect: {name} is wrapped in {type(part).__name__}; give the plain module, its gradients are "
                "reduced here (sharded models are to come later)"
            )
    if isinstance(thing, LBFGS):
        raise ValueError(
            f"protect: {name} is LBFGS, which evaluates the model several times per step through a closure; "
            "use an optimizer that steps once per gradient"
        )
    if not isinstance(thing, dict) and not (hasattr(thing, "state_dict") and hasattr(thing, "load_state_dict")):
        raise TypeError(
            f"protect: {name} is a {type(thing).__name__} without state_dict and load_state_dict; "
            "keep plain values in the dict run.state"
        )


def _reduces_by_itself(module: nn.Module) -> bool:
    if isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
        return True
    return any("FSDP" in base.__name__ or "FullyShardedDataParallel" in base.__name__ for base in type(module).__mro__)


Named = tuple[tuple[str, nn.Parameter], ...]


def _parameters(modules: Iterable[tuple[str, nn.Module]]) -> tuple[Named, Named]:
    """Those that want a gradient, and those that don't. An average of weights is never trained itself."""
    found: dict[int, tuple[str, nn.Parameter]] = {}
    frozen: dict[int, tuple[str, nn.Parameter]] = {}
    for name, parameter in _named_parameters(each for each in modules if not isinstance(each[1], AveragedModel)):
        if any(base.__name__ == "DTensor" for base in type(parameter).__mro__):  # importing it takes over a second
            raise ValueError(
                f"protect: parameter {name} is a DTensor; sharded models are to come later, "
                "give a model that lies whole on this rank"
            )
        kind = found if parameter.requires_grad else frozen
        kind.setdefault(id(parameter), (name, parameter))
    if not found:
        raise ValueError("protect: no parameter of the model has requires_grad=True, so there is nothing to train")
    return tuple(found.values()), tuple(frozen.values())


def _named_parameters(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[tuple[str, nn.Parameter]]:
    for prefix, module in modules:
        yield from module.named_parameters(prefix=prefix)


def _check_optimizer(name: str, optimizer: Optimizer, parameters: Named) -> None:
    known = {id(parameter) for _, parameter in parameters}
    for number, group in enumerate(optimizer.param_groups):
        for place, parameter in enumerate(group["params"]):
            if parameter.requires_grad and id(parameter) not in known:
                raise ValueError(
                    f"protect: {name} updates a parameter that the model does not have (group {number}, place {place}, "
                    f"shape {tuple(parameter.shape)}); pass the module that holds it to protect too, or build the "
                    "optimizer after the model has its final parameters"
                )


def _check_scheduled(name: str, optimizer: Optimizer, schedulers: tuple[tuple[str, LRScheduler], ...]) -> None:
    attached = bool(getattr(optimizer.step, "_wrapped_by_lr_sched", False))
    if attached and not any(_drives(scheduler, optimizer) for _, scheduler in schedulers):
        raise ValueError(
            f"protect: a scheduler is attached to {name} but not protected, and would be lost in a recovery; "
            "create it before protect and pass it as protect(..., scheduler=scheduler)"
        )


def _drives(scheduler: LRScheduler, optimizer: Optimizer) -> bool:
    own = getattr(scheduler, "optimizer", None)
    inner = getattr(scheduler, "_schedulers", ())
    return own is optimizer or any(_drives(part, optimizer) for part in inner)


def _check_device(parameters: Named, device: torch.device) -> None:
    for name, parameter in parameters:
        if parameter.device.type != device.type:
            raise ValueError(
                f"protect: parameter {name} is on {parameter.device}, this run trains on {device}; "
                "move the model with model.to(run.device) before building the optimizer"
            )


def is_plateau(scheduler: LRScheduler) -> bool:
    return isinstance(scheduler, ReduceLROnPlateau)


def _plain(value: object) -> str:
    return repr(value.tolist()) if isinstance(value, Tensor) else repr(value)
