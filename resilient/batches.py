"""The loop over micro-batches, of a model that each rank holds whole: gradients are folded as backward returns."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from torch import Tensor

from .backward import watched_backward
from .buffers import Buffers
from .core.order import derive_seed
from .core.seat import Compute, Park
from .errors import LoopError
from .gates import Gates
from .loop import TrainingLoop
from .randomness import seed_everything
from .sums import StepSums


class BatchesLoop(TrainingLoop):
    _backward_done = False
    _sought: tuple[int, tuple[int, ...]] | None = None

    def iterate(self) -> Generator[Any, None, None]:
        self.entered = True
        self.gates = gates = Gates(self.protected)
        buffers = Buffers(self.protected.modules)
        self.sums = StepSums(self.protected.parameters, buffers, self.feed.micro_batches)
        self.protected.check_schedulers()
        gates.set()
        try:
            with watched_backward(self._before_backward, self._after_backward):
                self.team.enter(self.brought())
                buffers.begin_step()
                while self.has_more() or not self.team.finished():
                    todo = self.team.next()
                    if isinstance(todo, Park):
                        self.park()
                        continue
                    assert isinstance(todo, Compute), todo
                    gates.check_in_place()
                    yield self._begin(todo.leaf)
                    self._check_backward_done()
                    self.check_stepped()
                    self.end_iteration(buffers)
        except GeneratorExit:
            self.leave(buffers)
            raise
        finally:
            self.end()

    def _begin(self, leaf: int) -> Any:
        """Everything that a micro-batch depends on is set here, from (seed, step, leaf) alone."""
        self._read_ahead()
        batch = self.feed.get(self.position(self.step), leaf)
        for _, parameter in self.protected.parameters:
            parameter.grad = None
        self.leaf, self._backward_done, self.committing = leaf, False, False
        seed_everything(derive_seed("micro-batch", self.seed, self.step, leaf))
        return batch

    def _read_ahead(self) -> None:
        """Aim the prefetch: at this step when it begins, at the next when the deal changes within it."""
        aim = self.position(self.step), self.team.leaves()
        if self._sought is None or self._sought[0] != aim[0]:
            self.feed.seek(*aim)
        elif self._sought != aim:
            self.feed.seek(aim[0] + 1, aim[1])
        self._sought = aim

    def drop_step(self) -> None:
        super().drop_step()
        self._sought = None

    # Backward

    def _before_backward(self) -> None:
        if self.leaf is None or self.paused:
            return
        if self._backward_done:
            raise LoopError("backward was called twice for one micro-batch; add the losses up and call backward once")

    def _after_backward(self, root: Tensor | None) -> None:
        if self.leaf is None or self.paused:
            return
        self._backward_done = True
        self.protected.check_frozen()
        self.sums.fold_leaf(self.leaf, None if root is None else self.gates.unscaled(root))
        self.team.folded(self.leaf)
        self.commit_or_go_on()

    def _check_backward_done(self) -> None:
        if not self._backward_done:
            raise LoopError(
                f"an iteration of step {self.step} ended without backward; every micro-batch must be "
                "differentiated, none can be skipped"
            )
