"""`run.epochs`: a loop over steps, in passes through the data.

An epoch's last step stays open until the next epoch asks for its first: what the user does at an epoch's end belongs to
the last step, acts once on each rank, and is in the state at the next step's start. So whoever joins there, or goes on
from a snapshot of it, does not repeat it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from snapshot.capture import capture
from snapshot.load import load
from snapshot.table import StateTable, copied

from .errors import LoopError
from .loop import TrainingLoop
from .step import Epoch, Step


class Epochs:
    """Begun by the first call of `run.steps` within it."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._loop: TrainingLoop | None = None
        self._engine: Iterator[Step] = iter(())
        self._arguments: tuple[Any, ...] = ()
        self._ahead: Step | None = None
        """A step that the engine has given already."""
        self._final: StateTable | None = None
        """Of a run that had trained all epochs before it was started again, the state: the last epoch's end is not
        repeated upon it."""
        self._asked = self._left = self._turned = self._over = False

    def begin(self, loop: TrainingLoop, arguments: tuple[Any, ...]) -> None:
        self._loop, self._engine, self._arguments = loop, loop.begin(), arguments

    def check_same(self, arguments: tuple[Any, ...]) -> None:
        """Raises ValueError if an epoch is to have other data than the first."""
        dataset, *others = arguments
        if dataset is not self._arguments[0] or others != list(self._arguments[1:]):
            what = "the dataset is another object: build it once, before run.epochs"
            if dataset is self._arguments[0]:
                what = f"global_batch, micro_batch and options were {self._arguments[1:]} and are {tuple(others)}"
            raise ValueError(f"run.steps within run.epochs: every epoch has the same data, but {what}")

    def __iter__(self) -> Iterator[Epoch]:
        while not self._over:
            self._asked = False
            yield Epoch(self._number)
            if self._left:
                raise LoopError(
                    "the loop over an epoch's steps was left before the epoch's end, and another epoch was to begin: "
                    "leave both loops, or none"
                )
            if not self._asked:
                raise LoopError("an epoch went by without a loop over run.steps(...)")
            self._turn()
        if self._final is not None and self._loop is not None:
            load(self._loop.watched(), self._final)

    def _turn(self) -> None:
        """An epoch is over. With the last one the loop ends, unless all ranks have to go back meanwhile."""
        assert self._loop is not None
        last = self._loop.feed.steps is not None and self._loop.step + 1 >= self._loop.feed.steps
        if last and not self._over:
            self._ahead = next(self._engine, None)
            self._over = self._ahead is None
        else:
            self._turned = True

    def steps(self) -> Iterator[Step]:
        """The rest of the epoch that the run is in."""
        if self._asked:
            raise LoopError("run.steps was called twice within one epoch; each epoch has one loop over its steps")
        self._asked = True
        went_on = False
        while (step := self._next()) is not None:
            went_on, self._turned = True, False
            try:
                yield step
            except GeneratorExit:
                self._left = True
                raise
            if self._ends_epoch(step):
                return
        self._over = True
        if not went_on and self._loop is not None:
            self._final = copied(capture(self._loop.watched()))

    def _next(self) -> Step | None:
        step, self._ahead = self._ahead, None
        return step if step is not None else next(self._engine, None)

    def _ends_epoch(self, step: Step) -> bool:
        loop = self._loop
        assert loop is not None
        return step.done and not step.given_up and loop.rollback is None and loop.ends_epoch(step.number)

    def _number(self) -> int:
        if self._loop is None or not self._loop.entered:
            return 0
        return min(self._loop.epoch_of(self._loop.step + self._turned), self.count - 1)
