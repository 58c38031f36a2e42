"""Loops over micro-batches, of a model that each rank holds whole.

Two forms on one engine. In the loop of two levels the user iterates over steps, and over each step's micro-batches:
a micro-batch is folded when the next one is asked for, and what follows the inner loop runs once per step. In the flat
loop the body runs once per micro-batch: its gradient is folded as `backward` returns, and updates act in the body of
the step's last one.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from .backward import Root, watched_backward
from .buffers import Buffers
from .core.order import derive_seed
from .core.seat import Apply, Compute, Park
from .errors import LoopError
from .gates import Gates, refused_wrappers
from .loop import WHOLE_STEP, TrainingLoop
from .randomness import seed_everything
from .step import Step
from .sums import StepSums


class MicroBatchLoop(TrainingLoop):
    """What both forms have in common."""

    _sought: tuple[int, tuple[int, ...]] | None = None
    _full = 0
    """How often the watch had to look at the structure anew when it was checked last."""
    _wanting: Sequence[bool] = ()
    """Of all parameters, whether they want a gradient."""
    _loss: Tensor | None = None
    """Of the micro-batch in hand, the sum of what its calls of backward began from; None before the first of them."""

    @contextmanager
    def _entered(self) -> Iterator[None]:
        """The loop's surroundings: set up before the first micro-batch, taken away however the loop ends."""
        self.entered = True
        self.gates = Gates(self.protected)
        if self.former is None:
            buffers = Buffers(self.protected.trained)
            self.sums = StepSums(self.protected.parameters, buffers, self.feed.micro_batches)
        else:
            self.sums = self.former.sums  # others may still need the last step's result
        self.protected.check_schedulers()
        self.protected.check_structure()
        self.gates.set()
        try:
            with watched_backward(self._before_backward, self._after_backward), refused_wrappers(self.protected):
                self.enter()
                yield
        except GeneratorExit:
            self.leave()
            raise
        finally:
            self.end()

    def _begin(self, leaf: int) -> Any:
        """Everything that a micro-batch depends on is set here, from (seed, step, leaf) alone."""
        self._read_ahead()
        batch = self.feed.get(self.position(self.step), leaf)
        for _, parameter in self.protected.all_parameters:
            parameter.grad = None
        self.leaf, self._loss, self.committing = leaf, None, False
        seed_everything(derive_seed("micro-batch", self.seed, self.step, leaf))
        return batch

    def _follow_structure(self) -> None:
        """Which parameters want a gradient may change at a step's beginning."""
        if self._full != self.watch.full:
            self._full = self.watch.full
            self.protected.check_structure()
        wanting = [parameter.requires_grad for _, parameter in self.protected.all_parameters]
        if wanting != self._wanting:
            self._wanting = wanting
            trained = [each for each in self.protected.all_parameters if each[1].requires_grad]
            if [name for name, _ in trained] != [name for name, _ in self.sums.parameters]:
                self.sums.reshape(trained, (), self.sums.buffers)

    def _read_ahead(self) -> None:
        """Aim the prefetch: at this step when it begins, at the next when the deal changes within it."""
        aim = self.position(self.step), self.team.leaves()
        if self._sought is None or self._sought[0] != aim[0]:
            self.feed.seek(*aim)
        elif self._sought != aim:
            self.feed.seek(aim[0] + 1, aim[1])
        self._sought = aim

    def begin_step(self) -> None:
        super().begin_step()
        self._follow_structure()

    def drop_step(self) -> None:
        super().drop_step()
        self._sought = None

    def _check_committing_known(self, known: bool) -> None:
        if not known and not self.paused:
            raise LoopError(
                f"run.committing was asked in step {self.step} before it can be known whether the micro-batch is the "
                "step's last: ask after backward; in a loop of two levels, behind the loop over the step's "
                "micro-batches, where it is always true"
            )

    def commit(self) -> None:
        self.watch.commit(self.step)
        super().commit()

    def _before_backward(self) -> None:
        raise NotImplementedError

    def _after_backward(self, roots: Sequence[Root]) -> None:
        raise NotImplementedError

    def _add_to_loss(self, roots: Sequence[Root]) -> None:
        for root, weight in roots:
            tensor = self.gates.unscaled(root)
            value = tensor.detach() if tensor.numel() == 1 or weight is None else (tensor * weight).detach().sum()
            self._loss = value if self._loss is None else self._loss.double() + value

    def _fold(self) -> None:
        """The micro-batch in hand is done: what it produced goes into the step's sums."""
        assert self.leaf is not None
        if self._loss is None:
            raise LoopError(
                f"a micro-batch of step {self.step} ended without backward; every micro-batch must be "
                "differentiated, none can be skipped"
            )
        self.sums.buffers.check_places()
        self.watch.in_force(self.step)
        self._follow_structure()
        self.gates.own_loss = self._loss if self.feed.micro_batches > 1 else None
        self.sums.fold_leaf(self.leaf, self._loss.reshape(()))
        self.team.folded(self.leaf)


class StepsLoop(MicroBatchLoop):
    """The loop of two levels."""

    _now: Step | None = None

    def iterate(self) -> Generator[Step, None, None]:
        with self._entered():
            while self.has_more() or not self.finished():
                if self.team.parked():
                    self.park()
                    continue
                self.gates.check_in_place()
                yield self._next_step()
                self._end_step()

    def _next_step(self) -> Step:
        self._now = step = Step(self)
        self.gates.early = (
            f"in step {self.step} it was called before the loop over the step's micro-batches had ended; write it "
            "behind that loop, where it runs once per step with the mean gradient (do not accumulate by hand: "
            "choose micro_batch and global_batch instead)"
        )
        seed_everything(derive_seed("step", self.seed, self.step))
        return step

    def micro_batches(self, step: Step) -> Generator[Any, None, None]:
        if step is not self._now or step.begun:
            raise LoopError(
                f"the micro-batches of step {step.number} are gone through once, in its own iteration: "
                "for step in run.steps(...): for batch in step: ..."
            )
        step.begun = True
        try:
            while isinstance(todo := self.team.next(), Compute):
                yield self._begin(todo.leaf)
                self._fold()
                self.leaf = None
        except GeneratorExit:
            self.leaf, self.gates.early = None, f"the loop over the micro-batches of step {self.step} was left by break"
            raise
        self.gates.early = ""
        step.done, step.given_up = True, isinstance(todo, Park)
        if isinstance(todo, Apply):
            self.commit()

    def _end_step(self) -> None:
        step, self._now = self._now, None
        assert step is not None
        if not step.done:
            raise LoopError(
                f"step {step.number} was left before all of its micro-batches were gone through; every one must be "
                "differentiated: for batch in step: ..., without break"
            )
        if not step.given_up:
            self.check_stepped()
        self.end_iteration()

    def is_committing(self) -> bool:
        self._check_committing_known(self._now is None or self._now.done)
        return super().is_committing()

    @property
    def logs_to(self) -> int | None:
        return super().logs_to if self._now is None or self.leaf is not None else WHOLE_STEP

    def _before_backward(self) -> None:
        if self.leaf is None and not self.paused and self._now is not None and not self._now.done:
            raise LoopError(
                f"backward was called in step {self.step} outside of the loop over its micro-batches, and its gradient "
                "would be lost: call it within that loop, or behind it"
            )

    def _after_backward(self, roots: Sequence[Root]) -> None:
        if self.leaf is not None and not self.paused:
            self._add_to_loss(roots)

    def leave(self) -> None:
        super().leave()
        if self._now is not None and not self._now.begun:
            self.left_in_step, self.left_at_boundary = None, True
            self.end_with_this()


class BatchesLoop(MicroBatchLoop):
    """The flat loop."""

    _backward_done = False

    def iterate(self) -> Generator[Any, None, None]:
        with self._entered():
            while self.has_more() or not self.finished():
                todo = self.team.next()
                if isinstance(todo, Park):
                    self.park()
                    continue
                assert isinstance(todo, Compute), todo
                self.gates.check_in_place()
                self._backward_done = self.asked_committing = False
                batch = self._begin(todo.leaf)
                self.gates.early = (
                    f"in step {self.step} it was called before backward, where nobody knows yet whether the "
                    "micro-batch is the step's last, and it would never act; write it behind backward, or the loop in "
                    "two levels: for step in run.steps(...): for x, y in step: ..."
                )
                yield batch
                self._end_micro_batch()

    def _end_micro_batch(self) -> None:
        if not self._backward_done:
            raise LoopError(
                f"an iteration of step {self.step} ended without backward; every micro-batch must be "
                "differentiated, none can be skipped"
            )
        self._check_step_called()
        self.check_stepped()
        if not self.committing and (changed := self.sums.buffers.changed()):
            raise LoopError(
                f"{changed} changed after backward in a micro-batch of step {self.step}, by a further forward in "
                "training mode, say: only what comes before backward is part of the micro-batch. Put it into `with "
                "run.evaluating():`, or write the loop in two levels: for step in run.steps(...): for x, y in step: ..."
            )
        self.end_iteration()

    def is_committing(self) -> bool:
        self._check_committing_known(self.leaf is None or self._backward_done)
        return super().is_committing()

    def _check_step_called(self) -> None:
        if not (self.gates.asked or self.asked_committing or self.rollback is not None):
            raise LoopError(
                f"an iteration of step {self.step} ended without optimizer.step(): call it in every iteration, it acts "
                "once per step. Do not accumulate gradients by hand, nor divide the loss by a number of iterations: "
                "global_batch / micro_batch of them make one step. To leave an update out, call zero_grad() before "
                "optimizer.step()"
            )

    def _before_backward(self) -> None:
        if self.leaf is None or self.paused:
            return
        if self._backward_done:
            raise LoopError("backward was called twice for one micro-batch; add the losses up and call backward once")

    def _after_backward(self, roots: Sequence[Root]) -> None:
        if self.leaf is None or self.paused:
            return
        self._backward_done, self.gates.early = True, ""
        self._add_to_loss(roots)
        self._fold()
        if isinstance(self.team.next(), Apply):
            self.commit()
