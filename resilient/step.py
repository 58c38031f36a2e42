"""`Step`: what a loop over steps hands to the user, and `Epoch`, the number of the pass through the data."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .errors import LoopError

if TYPE_CHECKING:
    from .loop import TrainingLoop


class Step:
    """One step: iterated over it gives this rank's micro-batches; what follows that loop runs once per step.

    A pipeline's step is not iterated over, but given to `pipe.train_step`.
    """

    def __init__(self, loop: TrainingLoop) -> None:
        self._loop = loop
        self.number = loop.step
        """From 0: the number of steps committed before this one."""
        self.begun = False
        """Whether the loop over its micro-batches has begun."""
        self.done = False
        """Whether that loop has ended: the mean gradient is in `.grad`, and updates act, unless it was given up."""
        self.given_up = False
        """Whether ranks were lost with their state, and the step is computed again from a snapshot: what follows in
        this iteration changes nothing, and is forgotten."""

    def __iter__(self) -> Iterator[Any]:
        return self._loop.micro_batches(self)

    def __repr__(self) -> str:
        return f"Step(number={self.number})"

    @property
    def loss(self) -> float:
        """Mean loss of the step, equal on all ranks. Raises LoopError before the step's micro-batches are done."""
        if not self.done:
            raise LoopError(f"step {self.number}: step.loss was read before the loop over its micro-batches had ended")
        return self._loop.loss

    @property
    def skipped(self) -> bool:
        """Whether the step goes by without an update, since its loss or gradient was not finite."""
        return self._loop.skipping

    @property
    def update(self) -> int:
        """With `run.steps(updates=n)`, which of the n steps on the same global batch it is, from 0."""
        return self._loop.position(self.number) % self._loop.feed.updates

    @property
    def epoch(self) -> int:
        """Which pass through the data the step belongs to, from 0. Raises LoopError for a stream, which has none."""
        return self._loop.epoch_of(self.number)

    @property
    def ends_epoch(self) -> bool:
        """Whether it is the last step of its pass through the data. False for a stream."""
        return self._loop.ends_epoch(self.number)

    def log(self, **values: float | Tensor) -> None:
        """As `run.log`. Behind the loop over micro-batches: one value per step, equal on all ranks."""
        self._loop.log(values)


class Epoch:
    """The number of the epoch that the run is in: it stands for that integer wherever one is expected.

    It is looked up when it is used. A process that takes a lost one's place learns only with its first step which epoch
    it is in, and a rollback may go back to an earlier one.
    """

    __slots__ = ("_number",)

    def __init__(self, number: Callable[[], int]) -> None:
        self._number = number

    def __index__(self) -> int:
        return self._number()

    def __hash__(self) -> int:
        return hash(self._number())

    def __int__(self) -> int:
        return self._number()

    def __float__(self) -> float:
        return float(self._number())

    def __bool__(self) -> bool:
        return bool(self._number())

    def __repr__(self) -> str:
        return repr(self._number())

    def __format__(self, spec: str) -> str:
        return format(self._number(), spec)


def _binary(operation: Callable[[Any, Any], Any], *, reflected: bool) -> Callable[[Epoch, Any], Any]:
    def method(self: Epoch, other: Any) -> Any:
        pair = int(self), int(other) if isinstance(other, Epoch) else other
        return operation(*(reversed(pair) if reflected else pair))

    return method


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
    setattr(Epoch, f"__{_name}__", _binary(getattr(operator, _name), reflected=False))
    setattr(Epoch, f"__r{_name}__", _binary(getattr(operator, _name), reflected=True))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(Epoch, f"__{_name}__", _binary(getattr(operator, _name), reflected=False))
