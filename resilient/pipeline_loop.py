"""The loop over a pipeline's steps: one iteration per step, in which `pipe.train_step` does all micro-batches."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import replace
from typing import Any

from torch import nn
from torch.optim import Optimizer

from .clipping import Untouched
from .core.seat import Apply
from .errors import LoopError
from .gates import Gates
from .loop import TrainingLoop
from .pipeline import Pipeline
from .state_watch import digest_of
from .step import Step
from .steps import StepLoop, clipping_refused
from .team import mean


class PipelineLoop(TrainingLoop):
    def __init__(self, pipe: Pipeline, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pipe = pipe

    def compared(self) -> Mapping[str, object]:
        """Of modules and optimizers ranks hold different parts."""
        return {name: thing for name, thing in self.watched().items() if not isinstance(thing, nn.Module | Optimizer)}

    def control(self) -> int:
        self.watch.in_force(self.step)
        return self.watch.digest() ^ digest_of(self.protected.control_state())

    def control_state(self) -> dict[str, object]:
        return {**self.protected.control_state(), **self.watch.plain_values()}

    def micro_batches(self, step: Step) -> Generator[Any, None, None]:
        raise LoopError(
            "a pipeline's step is not iterated over: its micro-batches go through the stages, by pipe.train_step(step)"
        )

    def iterate(self) -> Generator[Step, None, None]:
        self.entered = True
        steps = self._step_loop()
        self.gates = gates = Gates(self.protected, steps.update)
        self.stage, self.sums = steps.stage, steps.sums
        self.sums.check_finite = self.checks_finite
        self.protected.check_schedulers()
        gates.set()
        self._pipe.bind(steps.train)
        try:
            with clipping_refused(self.protected):
                self.team.enter(replace(self.brought(), stage=steps.stage, shape=steps.shape))
                self.begin_step()
                while self.has_more() or not self.finished():
                    if self.team.parked():
                        steps.drop()
                        self.park()
                        continue
                    gates.check_in_place()
                    steps.begin()
                    self.leaf = next(iter(self.team.leaves()), 0)
                    yield Step(self)
                    steps.check_trained()
                    if self.rollback is None and not self.team.parked():
                        self.check_stepped()
                    self.end_iteration()
        except GeneratorExit:
            self.leave()
            raise
        finally:
            self._pipe.bind(None)
            self.end()

    def _step_loop(self) -> StepLoop:
        return StepLoop(
            team=self.team,
            feed=self.feed,
            protected=self.protected,
            pipe=self._pipe,
            seed=self.seed,
            position=self.position,
            commit=self._commit,
            post=self.team.post(),
        )

    def _commit(self) -> float:
        """The step's mean loss."""
        self.untouched = None  # it holds the former step's gradients
        if isinstance(self.team.next(), Apply):
            self.commit()
        if not self.committing:
            return mean(self.sums.losses())
        outcome = self.sums.kept.outcome if self.sums.kept is not None else None
        norms = None if outcome is None else zip(self.sums.names, outcome.norms, strict=True)
        self.norms = None if norms is None else {name: norm for name, norm in norms if norm is not None}
        self.untouched = Untouched(self.sums.parameters) if norms is not None else None
        return self.loss
