"""The loop over a pipeline's steps, as one rank goes through it: one iteration per step, all of which commit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import Optimizer

from actors.post import Post

from .buffers import Buffers
from .core.events import PipelineShape
from .core.order import derive_seed
from .core.seat import Apply, Park
from .data import Feed
from .errors import LoopError
from .pipeline import Pipeline
from .protected import Protected
from .randomness import seed_everything
from .shards import OptimizerShards
from .stage_side import StageSide, users_by_parameter
from .stage_update import StageUpdate
from .stage_work import StageWork
from .step import Step
from .sums import StepSums
from .team import Team


class StepLoop:
    """What is behind `pipe.train_step`."""

    def __init__(
        self,
        *,
        team: Team,
        feed: Feed,
        protected: Protected,
        pipe: Pipeline,
        seed: int,
        position: Callable[[int], int],
        commit: Callable[[], float],
        post: Post | None,
    ) -> None:
        """position: of a step, which position in the data it trains on. commit: what `train_step` ends with, when the
        step's result is there."""
        self._team, self._feed, self._commit, self._position = team, feed, commit, position
        self._trained = False
        name = next(name for name, module in protected.modules if module is pipe)
        self.sums = StepSums((), Buffers([]), feed.micro_batches, pipe.device)
        self.sums.names = tuple(parameter for parameter, _ in protected.parameters)
        self.sums.users = users_by_parameter(name, pipe)
        self._work = StageWork(
            name,
            pipe,
            lambda: self.sums.buffers,
            lambda leaf: feed.get(position(team.step), leaf),
            lambda step, leaf, layer: seed_everything(derive_seed("micro-batch", seed, step, leaf, layer)),
            post,
        )
        shards = OptimizerShards(pipe, protected.optimizers) if pipe.shard_optimizer else None
        self._update = StageUpdate(shards, team, post) if shards is not None else None
        self.stage = StageSide(name, pipe, protected.optimizers, self.sums, self._work, shards)
        self.shape = PipelineShape(
            stages=pipe.stages, layer_bytes=pipe.layer_bytes(), rank_bytes=pipe.rank_bytes, sharded=shards is not None
        )

    def update(self, optimizer: Optimizer, original: Callable[[], Any]) -> Any:
        """The optimizer's own step, on all that this rank updates."""
        return original() if self._update is None else self._update.step(optimizer, original)

    def begin(self) -> None:
        self._trained = False
        if self._update is not None:
            self._update.begin_step()
        self._work.begin_step(self._team.step)
        leaves = self._team.leaves() if self._work.reads_data else ()
        self._feed.seek(self._position(self._team.step), leaves)

    def drop(self) -> None:
        """The step is given up."""
        self._work.drop()

    def train(self, step: object) -> float:
        """The mean loss. NaN if the step was given up meanwhile: what follows in the iteration counts for nothing."""
        if self._trained or not isinstance(step, Step) or step.number != self._team.step:
            raise LoopError(
                "pipe.train_step is called once in each iteration, with what run.steps has just given: "
                "for step in run.steps(...): loss = pipe.train_step(step)"
            )
        self._trained = True
        while True:
            action = self._team.next_of(self._work.choose)
            if isinstance(action, Park):
                step.done = step.given_up = True
                return float("nan")
            if isinstance(action, Apply):
                self._work.end_step()
                step.done = True
                return self._commit()
            if (folded := self._work.do(action)) is not None:
                self.sums.fold_stage(folded.leaf, folded.loss, folded.changes)
                self._team.folded(folded.leaf)

    def check_trained(self) -> None:
        if not self._trained:
            raise LoopError(
                "an iteration over run.steps ended without pipe.train_step(step), which computes the step's gradient"
            )


@contextmanager
def clipping_refused(protected: Protected) -> Iterator[None]:
    """Within it torch's own clipping of the pipeline's parameters raises LoopError."""
    original: Any = torch.nn.utils.clip_grad_norm_
    own = {id(parameter) for _, parameter in protected.parameters}

    def clip_grad_norm_(parameters: Any, *args: Any, **kwargs: Any) -> Any:
        given = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        if any(id(each) in own for each in given):
            raise LoopError(
                "torch.nn.utils.clip_grad_norm_ sees only the gradients of this rank's stage, and would clip by "
                "another norm than that of the whole model: use run.clip_grad_norm_(max_norm)"
            )
        return original(given, *args, **kwargs)

    torch.nn.utils.clip_grad_norm_ = clip_grad_norm_
    try:
        yield
    finally:
        torch.nn.utils.clip_grad_norm_ = original
