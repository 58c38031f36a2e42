"""Gates on the user's objects: outside the committing iteration of a step, updates do nothing.

The loop keeps its `step`, `zero_grad`, scheduler and scaler calls as they are; they act once per step,
after the last micro-batch, when `.grad` is the mean over the global batch. Gates are set on the
instances (a scheduler gets a class of its own), in place, and are taken off when the loop ends.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from .errors import LoopError
from .protected import Protected, is_plateau

GROUPING = "_group_tensors_by_device_and_dtype"
"""What torch's clipping groups gradients by."""


class Reduced(float):
    """A value that is equal on all ranks, because it was reduced over them."""


class Gates:
    """Opened by the commit of a step, closed at the next micro-batch."""

    def __init__(
        self, protected: Protected, update: Callable[[Optimizer, Callable[[], Any]], Any] | None = None
    ) -> None:
        """update: takes an optimizer's own step and carries it out; it is called as it is without that."""
        self.open = False
        self.early = ""
        """Why updates are refused now; empty where they merely do nothing outside of the commit."""
        self.own_loss: Tensor | None = None
        """Of this rank's last micro-batch."""
        self._update = update
        self.asked = False
        """Whether an optimizer has been asked to step in this iteration."""
        self.stepped = False
        """Whether that was since the gates opened."""
        self._protected = protected
        self._covered: list[tuple[Any, str, Any]] = []
        """What an instance had in a gate's place before: a scheduler's own wrapper, or nothing."""
        self._optimizer_gates: dict[str, MethodType] = {}
        self._classes: list[tuple[Any, type]] = []
        self._scaled: tuple[Tensor, Tensor] | None = None

    @property
    def scaled(self) -> bool:
        """Whether a GradScaler looks after gradients that are not finite."""
        return bool(self._protected.scalers)

    def set(self) -> None:
        for name, optimizer in self._protected.optimizers:
            self._optimizer_gates[name] = self._gate(
                optimizer, "step", functools.partial(self._optimizer_step, optimizer)
            )
        for name, scheduler in self._protected.schedulers:
            check = functools.partial(self._check_plateau, name) if is_plateau(scheduler) else None
            self._gate_by_class(scheduler, functools.partial(self._only_open, check))
        for _, module in self._protected.modules:
            if isinstance(module, AveragedModel):
                self._gate(module, "update_parameters", functools.partial(self._only_open, None))
        for _, scaler in self._protected.scalers:
            for method in ("update", "unscale_"):
                self._gate(scaler, method, functools.partial(self._only_open, None))
            self._gate(scaler, "step", self._scaler_step)
            self._gate(scaler, "scale", self._scale)

    def take_off(self) -> None:
        for thing, method, before in reversed(self._covered):
            if before is None:
                thing.__dict__.pop(method, None)
            else:
                thing.__dict__[method] = before
        self._covered.clear()
        for scheduler, kind in self._classes:
            del type(scheduler).step  # a class refers to itself: it would keep this object, and all models, for long
            scheduler.__class__ = kind
        self._classes.clear()
        self._optimizer_gates.clear()

    def close(self) -> None:
        self.open, self.stepped, self.asked, self.early = False, False, False, ""

    def _is_closed(self, what: str) -> bool:
        if self.early:
            raise LoopError(f"{what}: {self.early}")
        return not self.open

    def check_in_place(self) -> None:
        """Raises LoopError if something has been put around a gate, as a late scheduler does."""
        for name, optimizer in self._protected.optimizers:
            if optimizer.__dict__.get("step") is not self._optimizer_gates[name]:
                raise LoopError(
                    f"{name}.step was replaced after protect, as a scheduler that is created later does; "
                    "create schedulers first, and pass them as protect(..., scheduler=scheduler)"
                )

    def unscaled(self, loss: Tensor) -> Tensor:
        """The loss that a protected GradScaler made this tensor from, or the tensor itself."""
        if self._scaled is not None and self._scaled[0] is loss:
            return self._scaled[1]
        return loss

    def _gate(self, thing: Any, method: str, gate: Callable[..., Any]) -> MethodType:
        """A bound method like the original: a scheduler that wraps it later expects one."""
        original = getattr(thing, method)

        @functools.wraps(getattr(original, "__func__", original))
        def gated(_: Any, *args: Any, **kwargs: Any) -> Any:
            return gate(original, *args, **kwargs)

        self._covered.append((thing, method, thing.__dict__.get(method)))
        thing.__dict__[method] = bound = MethodType(gated, thing)
        return bound

    def _gate_by_class(self, scheduler: Any, gate: Callable[..., Any]) -> None:
        """A scheduler's state is all of its attributes, so its gate must not be one of them."""
        kind = type(scheduler)

        def step(own: Any, *args: Any, **kwargs: Any) -> Any:
            return gate(functools.partial(kind.step, own), *args, **kwargs)

        scheduler.__class__ = type(kind.__name__, (kind,), {"step": step, "__module__": kind.__module__})
        self._classes.append((scheduler, kind))

    def _only_open(self, check: Callable[..., None] | None, original: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        if self._is_closed(getattr(getattr(original, "func", original), "__qualname__", "an update")):
            return None
        if check is not None:
            check(*args, **kw)
        return original(*args, **kw)

    def _check_plateau(self, name: str, metrics: object = None, *_: object) -> None:
        if _differs_by_rank(metrics, self.own_loss):
            raise LoopError(
                f"{name}.step was given {metrics!r}, the loss of this rank's own micro-batch, which differs between "
                'ranks; a ReduceLROnPlateau takes run.reduced("loss"), step.loss, or what all ranks have computed '
                "alike `with run.evaluating():`"
            )

    def _optimizer_step(self, optimizer: Optimizer, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if any(callable(argument) for argument in (*args, kwargs.get("closure"))):
            raise LoopError(
                "optimizer.step was given a closure, which would run the model again outside the step's "
                "micro-batches: call backward in the loop, and optimizer.step() without arguments"
            )
        self.asked = True
        if self._is_closed("optimizer.step()"):
            return None
        self.stepped = True
        update = functools.partial(original, *args, **kwargs)
        return update() if self._update is None else self._update(optimizer, update)

    def _scaler_step(self, original: Callable[..., Any], optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        self.asked = True
        if self._is_closed("scaler.step(optimizer)"):
            return None
        self.stepped = True
        return original(optimizer, *args, **kwargs)

    def _scale(self, original: Callable[..., Any], outputs: Any) -> Any:
        scaled = original(outputs)
        if isinstance(outputs, Tensor):
            self._scaled = (scaled, outputs.detach())
        return scaled


@contextmanager
def refused_wrappers(protected: Protected) -> Iterator[None]:
    """Within it an average of weights that is not protected is not updated, nor does a DDP around a model run; and
    clipping by value takes that there is nothing to clip."""
    update, forward = AveragedModel.update_parameters, DistributedDataParallel.forward
    grouped = getattr(clip_grad, GROUPING, None)

    def group_tensors(lists: list[list[Tensor]], *args: Any, **kwargs: Any) -> Any:
        """clip_grad_value_ fails where there is no gradient, as before a step's last micro-batch in a flat loop."""
        return grouped(lists, *args, **kwargs) if grouped is not None and lists[0] else {}

    def update_parameters(self: Any, *args: Any, **kwargs: Any) -> Any:
        if all(module is not self for _, module in protected.modules):
            raise LoopError(
                "an AveragedModel was updated that is not protected, and would be lost with this process: "
                "pass it as protect(..., ema=ema)"
            )
        return update(self, *args, **kwargs)

    def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise LoopError("a model runs within DistributedDataParallel: call the plain one, gradients are reduced here")

    AveragedModel.update_parameters, DistributedDataParallel.forward = update_parameters, refuse  # type: ignore[method-assign]
    if grouped is not None:
        setattr(clip_grad, GROUPING, group_tensors)
    try:
        yield
    finally:
        AveragedModel.update_parameters, DistributedDataParallel.forward = update, forward  # type: ignore[method-assign]
        if grouped is not None:
            setattr(clip_grad, GROUPING, grouped)


def _differs_by_rank(metrics: object, own_loss: Tensor | None) -> bool:
    """Whether it is the loss of this rank's own micro-batch. Of other values ranks compare what the scheduler makes."""
    if isinstance(metrics, Reduced):
        return False
    if isinstance(metrics, Tensor) and metrics.requires_grad:
        return True
    return own_loss is not None and isinstance(metrics, float | Tensor) and float(metrics) == float(own_loss)
