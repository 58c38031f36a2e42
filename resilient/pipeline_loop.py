"""The loop over a pipeline's steps: one iteration per step, in which `pipe.train_step` does all micro-batches."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from typing import Any

from .clipping import Untouched
from .gates import Gates
from .loop import TrainingLoop
from .pipeline import Pipeline
from .steps import Step, StepLoop, clipping_refused
from .team import mean


class PipelineLoop(TrainingLoop):
    def __init__(self, pipe: Pipeline, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pipe = pipe

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
                self.sums.buffers.begin_step()
                while self.has_more() or not self.team.finished():
                    if self.team.parked():
                        steps.drop()
                        self.park()
                        continue
                    gates.check_in_place()
                    step = steps.begin()
                    self.leaf = next(iter(self.team.leaves()), 0)
                    yield step
                    steps.check_trained()
                    if self.rollback is None and not self.team.parked():
                        self.check_stepped()
                    self.end_iteration(self.sums.buffers)
        except GeneratorExit:
            self.leave(self.sums.buffers)
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
        self.commit_or_go_on()
        if not self.committing:
            return mean(self.sums.losses())
        outcome = self.sums.kept.outcome if self.sums.kept is not None else None
        norms = None if outcome is None else zip(self.sums.names, outcome.norms, strict=True)
        self.norms = None if norms is None else {name: norm for name, norm in norms if norm is not None}
        self.untouched = Untouched(self.sums.parameters) if norms is not None else None
        return self.loss
