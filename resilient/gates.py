"""Gates on the user's objects: outside the committing iteration of a step, updates do nothing.

The loop keeps its `step`, `zero_grad`, scheduler and scaler calls as they are; they act once per step,
after the last micro-batch, when `.grad` is the mean over the global batch. Gates are set on the
instances (a scheduler gets a class of its own), in place, and are taken off when the loop ends.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from .errors import LoopError
from .protected import Protected, is_plateau


class Reduced(float):
    """A value that is equal on all ranks, because it was reduced over them."""


class Gates:
    """Opened by the commit of a step, closed at the next micro-batch."""

    def __init__(
        self, protected: Protected, update: Callable[[Optimizer, Callable[[], Any]], Any] | None = None
    ) -> None:
        """update: takes an optimizer's own step and carries it out; it is called as it is without that."""
        self.open = False
        self._update = update
        self.stepped = False
        """Whether an optimizer has been asked to step since the gates opened."""
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
            check = functools.partial(_check_plateau, name) if is_plateau(scheduler) else None
            self._gate_by_class(scheduler, functools.partial(self._only_open, check))
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
            scheduler.__class__ = kind
        self._classes.clear()

    def close(self) -> None:
        self.open, self.stepped = False, False

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
        if not self.open:
            return None
        if check is not None:
            check(*args, **kw)
        return original(*args, **kw)

    def _optimizer_step(self, optimizer: Optimizer, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if any(argument is not None for argument in (*args, kwargs.get("closure"))):
            raise LoopError(
                "optimizer.step was given a closure, which would run the model again outside the step's "
                "micro-batches: call backward in the loop, and optimizer.step() without arguments"
            )
        if not self.open:
            return None
        self.stepped = True
        return original() if self._update is None else self._update(optimizer, original)

    def _scaler_step(self, original: Callable[..., Any], optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        if not self.open:
            return None
        self.stepped = True
        return original(optimizer, *args, **kwargs)

    def _scale(self, original: Callable[..., Any], outputs: Any) -> Any:
        scaled = original(outputs)
        if isinstance(outputs, Tensor):
            self._scaled = (scaled, outputs.detach())
        return scaled


def _check_plateau(name: str, metrics: object = None, *_: object) -> None:
    if not isinstance(metrics, Reduced):
        raise LoopError(
            f"{name}.step was given {metrics!r}, which may differ between ranks; "
            'a ReduceLROnPlateau takes run.reduced("loss")'
        )
