"""`Run`: what a training function receives, and the loop around the user's loop body."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from snapshot.capture import capture
from snapshot.core.branches import data_position
from snapshot.core.digest import StatePart

from .backward import watched_backward
from .buffers import Buffers
from .clipping import Untouched, clip
from .core.order import derive_seed
from .core.seat import Apply, Compute, Park, Rollback
from .data import Feed
from .elementwise import check_elementwise
from .errors import LoopError
from .gates import Gates, Reduced
from .pipeline import Layer, Pipeline
from .protected import Protected
from .randomness import seed_everything
from .stage_side import StageSide
from .steps import Step, StepLoop, clipping_refused
from .sums import StepSums
from .team import Loop, Team, mean

MOST_REFUSALS = 3
"""So many times in a row a step's data is left out because it was not finite; then the run stops."""
OnNonfinite = Literal["ignore", "stop", "skip", "rollback"]


class Run:
    """One rank's view of a training run."""

    def __init__(self, team: Team, *, seed: int, device: torch.device, on_nonfinite: OnNonfinite = "ignore") -> None:
        self.state: dict[str, Any] = {}
        """Plain values that belong to the state: counters, histories. Captured with everything else."""
        self.device = device
        self.committing = False
        """Whether this iteration is the last of its step: gradients are reduced, and updates act."""
        self._team = team
        self._seed = seed
        self._on_nonfinite = on_nonfinite
        self._protected: Protected | None = None
        self._pipeline: Pipeline | None = None
        self._stage: StageSide | None = None
        self._norms: dict[str, float] | None = None
        """Of the mean gradients of the step that is being committed, if some of them are on other ranks."""
        self._untouched: Untouched | None = None
        self._loop: weakref.ref[Generator[Any, None, None]] | None = None
        """The loop that was asked for. Held by the user alone, so that a break ends it at once."""
        self._entered = False
        self._leaf: int | None = None
        self._backward_done = False
        self._paused = False
        self._sought: tuple[int, tuple[int, ...]] | None = None
        self._left_in_step: int | None = None
        self._rollback: Rollback | None = None
        self._refused = (-1, 0)
        """The last step that was not finite, and with how much data in a row."""
        self._skipping = False
        """Whether the present step goes by without an update."""
        self._logged: dict[int, dict[str, float]] = {}
        self._reduced: dict[str, float] = {}
        seed_everything(derive_seed("function", seed))

    @property
    def step(self) -> int:
        """Number of the current step, from 0: the number of steps committed so far."""
        return self._team.step

    @property
    def rank(self) -> int:
        """This process's place in the current generation, 0..world_size-1. Changes when ranks come and go."""
        return self._team.rank

    @property
    def world_size(self) -> int:
        return self._team.size

    @property
    def generation(self) -> int:
        """Number of the current membership of ranks."""
        return self._team.generation

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0 now."""
        return self.rank == 0

    def protect(self, **objects: object) -> None:
        """Hand over all that makes up the training state, once, before the loop.

        Modules, optimizers, schedulers, GradScalers, and anything else with state_dict and
        load_state_dict. They are changed in place: updates act once per step. Rank 0's state is
        everybody's. Raises ValueError or TypeError naming the argument and what to do.
        """
        if self._loop is not None:
            raise ValueError("protect was called after run.batches began; call it once, before the loop")
        if self._protected is not None:
            raise ValueError("protect was called twice; pass everything in one call: protect(model=..., optimizer=...)")
        self._protected = Protected.of(objects, self.device)

    def batches(
        self,
        dataset: Any,
        *,
        global_batch: int,
        micro_batch: int,
        steps: int | None = None,
        epochs: int | None = None,
        **loader: Any,
    ) -> Iterator[Any]:
        """This rank's micro-batches, step after step, collated as a DataLoader would.

        dataset: map-style or iterable. global_batch: samples per step; micro_batch: samples per
        micro-batch, a divisor of it. steps or epochs: length of the loop. `loader` takes shuffle (on by
        default) and DataLoader's num_workers, collate_fn, pin_memory, prefetch_factor and the like.
        The order of samples depends on the run's seed and the epoch only. Raises ValueError naming
        field, value and what is allowed.
        """
        feed = self._feed(dataset, global_batch, micro_batch, steps, epochs, loader, "run.batches")
        if self._pipeline is not None:
            raise ValueError("run.batches was called in a run with a pipeline; its loop is: for step in run.steps(...)")
        assert self._protected is not None
        loop = self._iterate(feed, self._protected)
        self._loop = weakref.ref(loop)
        return loop

    def _feed(
        self,
        dataset: Any,
        global_batch: int,
        micro_batch: int,
        steps: int | None,
        epochs: int | None,
        loader: Mapping[str, Any],
        what: str,
    ) -> Feed:
        if self._protected is None:
            raise ValueError(f"{what} was called before run.protect; call protect(model=..., optimizer=...) first")
        if self._loop is not None:
            raise ValueError(f"{what} was called twice; a run has one loop: ask for all its steps at once")
        feed = Feed(
            dataset,
            global_batch=global_batch,
            micro_batch=micro_batch,
            steps=steps,
            epochs=epochs,
            seed=derive_seed("data", self._seed),
            **loader,
        )
        most = self._team.workers[1]
        stages = 1 if self._pipeline is None else self._pipeline.stages
        if most > feed.micro_batches * stages:
            raise ValueError(
                f"workers allows {most} ranks, but a step has only {feed.micro_batches} micro-batches "
                f"(global_batch {global_batch} / micro_batch {micro_batch}) and every rank needs one: "
                f"use workers of at most {feed.micro_batches * stages}, or a smaller micro_batch"
            )
        return feed

    def pipeline(
        self,
        layers: Sequence[Layer],
        loss: Callable[..., Tensor],
        *,
        stages: int,
        tied: Mapping[str, str] | None = None,
        checkpoint: bool = False,
        schedule: Literal["1f1b", "gpipe"] = "1f1b",
        rank_bytes: int | None = None,
        shard_optimizer: bool = False,
    ) -> Pipeline:
        """A model as a chain of layers, cut into stages over the ranks; to be trained with `run.steps`.

        layers: modules, or callables that build them: then a rank has memory only for those that it holds. Each is
        called with what the one before returns, a tensor or a tuple of them. loss: called with what the last layer
        returns and the target. stages: how many, if there are enough ranks. tied: {"layers.5.weight":
        "layers.0.weight"} trains a later layer's parameter as one with an earlier one's; modules that share a parameter
        do so anyway. checkpoint: keep only each layer's input for backward, and compute the rest again. schedule:
        "gpipe" goes forward through all micro-batches first. rank_bytes: the most bytes of parameters and buffers that
        a rank may hold. shard_optimizer: of what an optimizer keeps for a parameter, each rank of the parameter's stage
        has only some chunks, and updates these; the others are told the new values. It needs optimizers that update
        each element by itself. A rank's death loses its chunks, so then all go back to a snapshot. Raises ValueError or
        TypeError, naming the argument.
        """
        if self._protected is not None:
            raise ValueError("run.pipeline was called after protect; build the pipeline first, and protect it")
        if self._team.reduction != "exact":
            raise ValueError('run.pipeline needs reduction="exact": pipelines have no other')
        self._pipeline = Pipeline(
            layers,
            loss,
            stages=stages,
            tied=tied or {},
            checkpoint=checkpoint,
            schedule=schedule,
            rank_bytes=rank_bytes,
            shard_optimizer=shard_optimizer,
            seed=self._seed,
            device=self.device,
        )
        return self._pipeline

    def steps(
        self,
        dataset: Any,
        *,
        global_batch: int,
        micro_batch: int,
        steps: int | None = None,
        epochs: int | None = None,
        **loader: Any,
    ) -> Iterator[Step]:
        """The steps of a loop over a pipeline, each to be given to `pipe.train_step`. Arguments as of `batches`.

        A micro-batch is a pair (inputs, target).
        """
        if self._pipeline is None:
            raise ValueError("run.steps needs a pipeline: pipe = run.pipeline(...); other models use run.batches")
        feed = self._feed(dataset, global_batch, micro_batch, steps, epochs, loader, "run.steps")
        assert self._protected is not None
        if all(module is not self._pipeline for _, module in self._protected.modules):
            raise ValueError("run.steps: the pipeline is not protected; pass it as protect(model=pipe, ...)")
        for name, optimizer in self._protected.optimizers if self._pipeline.shard_optimizer else ():
            check_elementwise(name, optimizer)
        if feed.steps == 1 and self._pipeline.stages > 1:
            raise ValueError("run.steps(steps=1): a pipeline of several stages trains for two steps at least")
        loop = self._iterate_steps(feed, self._protected, self._pipeline)
        self._loop = weakref.ref(loop)
        return loop

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale the gradient so that its 2-norm over the whole model is at most `max_norm`; the norm before that.

        As `torch.nn.utils.clip_grad_norm_`, for pipelines too, on whatever ranks their layers are.
        """
        if self._protected is None:
            raise ValueError("run.clip_grad_norm_ was called before run.protect")
        if not self.committing:
            return torch.tensor(float("nan"))
        if self._untouched is not None:
            self._untouched.check()
            self._untouched = None
        return clip(self._protected.parameters, self._norms, max_norm)

    def log(self, **values: float | Tensor) -> None:
        """Record values for this step. What each micro-batch logs is averaged over the step.

        The loss is recorded by itself, exactly, from the value that backward starts from.
        """
        if self._leaf is None:
            raise LoopError("run.log was called outside the training loop; return values from the function instead")
        if "step" in values:
            raise ValueError(
                f"run.log(step={values['step']!r}): every row has its step already; log it by another name"
            )
        mine = self._logged.setdefault(self._leaf, {})
        for name, value in values.items():
            if name != "loss":
                mine[name] = float(value.detach() if isinstance(value, Tensor) else value)

    def reduced(self, name: str) -> Reduced:
        """A value reduced over the whole step, equal on all ranks; "loss" is the one there is.

        In a committing iteration that of this step, before it that of the step before (NaN at first).
        """
        if name != "loss":
            raise ValueError(f'run.reduced({name!r}): only "loss" is reduced within the step')
        return Reduced(self._reduced.get(name, float("nan")))

    def rollback(self, *, steps: int, why: str = "the training function asked for a rollback") -> None:
        """Go back by `steps` steps or more, to a snapshot, and leave out the data since: a loss spike, say.

        To be called in a committing iteration (see `committing`), on all ranks alike. The rest of the iteration
        runs as it would, and is then forgotten. The run ends with an error if there is no such snapshot.
        """
        if not self.committing:
            raise LoopError(
                "run.rollback was called outside of a committing iteration; decide where run.committing is "
                'true, on what is equal on all ranks, such as run.reduced("loss")'
            )
        if not (isinstance(steps, int) and 1 <= steps <= self.step + 1):
            raise ValueError(
                f"run.rollback(steps={steps!r}): is a whole number from 1 to {self.step + 1}, the steps so far"
            )
        self._rollback = Rollback(
            back_to=self.step + 1 - steps,
            skip_from=None,
            skip_to=self._position(self.step),
            why=f"step {self.step}: {why}",
        )

    @contextmanager
    def pause(self, reason: str) -> Iterator[None]:
        """Around work that makes no training progress, such as a long validation: not taken for a hang.

        A backward inside it is the user's own affair, and not the micro-batch's.
        """
        self._team.pause(reason)
        self._paused = True
        try:
            yield
        finally:
            self._paused = False
            self._team.pause(None)

    # The loop around the loop

    def _iterate(self, feed: Feed, protected: Protected) -> Generator[Any, None, None]:
        self._entered = True
        gates = Gates(protected)
        buffers = Buffers(protected.modules)
        sums = StepSums(protected.parameters, buffers, feed.micro_batches)
        protected.check_schedulers()
        gates.set()

        def after_backward(root: Tensor | None) -> None:
            if self._leaf is None or self._paused:
                return
            self._fold(sums, protected, None if root is None else gates.unscaled(root))
            self._commit_or_go_on(sums, gates)

        try:
            with watched_backward(self._before_backward, after_backward):
                self._team.enter(self._brought(feed, protected, sums))
                buffers.begin_step()
                while self._has_more(feed) or not self._team.finished():
                    todo = self._team.next()
                    if isinstance(todo, Park):
                        self._park(sums)
                        continue
                    assert isinstance(todo, Compute), todo
                    gates.check_in_place()
                    yield self._begin(todo.leaf, feed, protected)
                    self._end_iteration(gates)
                    gates.close()
                    if self._rollback is not None:
                        self._go_back(self._rollback, sums)
                    elif self.committing or self._skipping:
                        self._cross_boundary(buffers)
        except GeneratorExit:
            self._leave(gates, buffers)
            raise
        finally:
            self._leaf = None
            gates.take_off()
            feed.close()

    def _iterate_steps(self, feed: Feed, protected: Protected, pipe: Pipeline) -> Generator[Step, None, None]:
        self._entered = True
        loop = StepLoop(
            team=self._team,
            feed=feed,
            protected=protected,
            pipe=pipe,
            seed=self._seed,
            position=self._position,
            commit=lambda: self._commit_step(loop.sums, gates),
            post=self._team.post(),
        )
        gates = Gates(protected, loop.update)
        self._stage, sums = loop.stage, loop.sums
        sums.check_finite = self._on_nonfinite != "ignore"
        protected.check_schedulers()
        gates.set()
        pipe.bind(loop.train)
        try:
            with clipping_refused(protected):
                self._team.enter(replace(self._brought(feed, protected, sums), stage=loop.stage, shape=loop.shape))
                while self._has_more(feed) or not self._team.finished():
                    if self._team.parked():
                        loop.drop()
                        self._park(sums)
                        continue
                    gates.check_in_place()
                    sums.buffers.begin_step()
                    step = loop.begin()
                    self._leaf = next(iter(self._team.leaves()), 0)
                    yield step
                    loop.check_trained()
                    if self._rollback is None and not self._team.parked():
                        self._backward_done = True
                        self._end_iteration(gates)
                    gates.close()
                    if self._rollback is not None:
                        self._go_back(self._rollback, sums)
                    elif self.committing or self._skipping:
                        self._cross_boundary(sums.buffers)
        except GeneratorExit:
            self._leave(gates, sums.buffers)
            raise
        finally:
            self._leaf = None
            pipe.bind(None)
            gates.take_off()
            feed.close()

    def _commit_step(self, sums: StepSums, gates: Gates) -> float:
        self._commit_or_go_on(sums, gates)
        if self.committing:
            outcome = sums.kept.outcome if sums.kept is not None else None
            norms = None if outcome is None else zip(sums.names, outcome.norms, strict=True)
            self._norms = None if norms is None else {name: norm for name, norm in norms if norm is not None}
            self._untouched = Untouched(sums.parameters) if norms is not None else None
        return self._reduced.get("loss", float("nan")) if self.committing else mean(sums.losses())

    def _go_back(self, rollback: Rollback, sums: StepSums) -> None:
        self._drop_step(sums)
        self._team.roll_back(rollback)

    def _park(self, sums: StepSums) -> None:
        """Drop what this step has come to, and go on from the snapshot that takes the state's place."""
        self._drop_step(sums)
        self._team.park()
        sums.buffers.begin_step()  # in a pipeline other layers may be here than before

    def _drop_step(self, sums: StepSums) -> None:
        self._leaf, self.committing, self._skipping, self._rollback = None, False, False, None
        self._logged, self._sought = {}, None
        sums.forget()

    def _brought(self, feed: Feed, protected: Protected, sums: StepSums) -> Loop:
        def objects() -> Mapping[str, object]:
            return {
                **{f"user:{name}": thing for name, thing in protected.objects.items()},
                "run.state": self.state,
                "run.data": _At(feed, self._team),
                "run.buffers": _KnownBuffers(sums),
            }

        return Loop(
            sums=sums,
            steps=feed.steps,
            objects=objects,
            control_state=protected.control_state,
            leave=self._end_loop,
        )

    def _has_more(self, feed: Feed) -> bool:
        feed.leave_out(len(self._team.skipped))
        return (feed.steps is None or self.step < feed.steps) and feed.has_step(self._position(self.step))

    def _position(self, step: int) -> int:
        """Which position in the data the step trains on."""
        return data_position(step, self._team.skipped)

    def _begin(self, leaf: int, feed: Feed, protected: Protected) -> Any:
        """Everything that a micro-batch depends on is set here, from (seed, step, leaf) alone."""
        self._read_ahead(feed)
        batch = feed.get(self._position(self.step), leaf)
        for _, parameter in protected.parameters:
            parameter.grad = None
        self._leaf, self._backward_done, self.committing = leaf, False, False
        seed_everything(derive_seed("micro-batch", self._seed, self.step, leaf))
        return batch

    def _read_ahead(self, feed: Feed) -> None:
        """Aim the prefetch: at this step when it begins, at the next when the deal changes within it."""
        aim = self._position(self.step), self._team.leaves()
        if self._sought is None or self._sought[0] != aim[0]:
            feed.seek(*aim)
        elif self._sought != aim:
            feed.seek(aim[0] + 1, aim[1])
        self._sought = aim

    def _before_backward(self) -> None:
        if self._leaf is None or self._paused:
            return
        if self._backward_done:
            raise LoopError("backward was called twice for one micro-batch; add the losses up and call backward once")

    def _fold(self, sums: StepSums, protected: Protected, loss: Tensor | None) -> None:
        assert self._leaf is not None
        self._backward_done = True
        protected.check_frozen()
        sums.fold_leaf(self._leaf, loss)
        self._team.folded(self._leaf)

    def _commit_or_go_on(self, sums: StepSums, gates: Gates) -> None:
        if not isinstance(self._team.next(), Apply):
            return
        if self._on_nonfinite != "ignore" and not sums.is_finite(gradients=not gates.scaled):
            self._refuse(sums)
            return
        losses = sums.apply()
        self._team.committed(losses)
        self._reduced = {"loss": mean(losses)}
        self.committing = True
        gates.open = True
        seed_everything(derive_seed("commit", self._seed, self.step))

    def _refuse(self, sums: StepSums) -> None:
        """The step's loss or gradient is not finite: nothing of it reaches the state."""
        what = f"the loss or gradient of step {self.step} is not finite (loss {mean(sums.losses())})"
        if self._on_nonfinite == "stop":
            raise LoopError(f'{what}; on_nonfinite="skip" or "rollback" would go on without this step\'s data')
        position = self._position(self.step)
        if self._on_nonfinite == "rollback":
            self._refused = (self.step, self._refused[1] + 1 if self._refused[0] == self.step else 1)
            if self._refused[1] > MOST_REFUSALS:
                raise LoopError(f"{what}, nor was it with the data of {MOST_REFUSALS} others: the state itself is bad")
            self._rollback = Rollback(back_to=self.step, skip_from=position, skip_to=position, why=what)
        else:
            self._skipping = True
            assert self._leaf is not None
            self._logged.setdefault(self._leaf, {})["skipped"] = 1.0
            self._team.committed(sums.losses())

    def _end_iteration(self, gates: Gates) -> None:
        if not self._backward_done:
            raise LoopError(
                f"an iteration of step {self.step} ended without backward; every micro-batch must be "
                "differentiated, none can be skipped"
            )
        if self.committing and not gates.stepped:
            raise LoopError(
                f"step {self.step} was committed without optimizer.step(); call it in every iteration: it acts "
                "once per step, when the gradients of all micro-batches have been added up (do not accumulate "
                "by hand, choose micro_batch and global_batch instead)"
            )

    def _cross_boundary(self, buffers: Buffers) -> None:
        logged, self._logged = self._logged, {}
        self.committing = self._skipping = False
        self._leaf = None
        buffers.begin_step()
        self._team.applied(logged)

    def _leave(self, gates: Gates, buffers: Buffers) -> None:
        """The user broke out of the loop: in good order right after a commit, and only there."""
        if self.committing and gates.stepped:
            self._cross_boundary(buffers)
            if not self._team.finished():
                os._exit(1)  # the user's code can't be gone back to: another process takes this one's place
        else:
            self._left_in_step = self.step

    def _end_loop(self) -> None:
        """Leave the loop now, although the user or a traceback still holds its iterator."""
        loop = self._loop() if self._loop is not None else None
        if loop is not None:
            loop.close()

    def digest(self) -> str | StatePart:
        """xxh3-128 of the bits of all that is protected, and of run.state; of a stage what it has to give to that."""
        assert self._protected is not None
        objects = {f"user:{name}": thing for name, thing in self._protected.objects.items()}
        table = capture({**objects, "run.state": self.state})
        return table.digest() if self._stage is None or self._stage.is_only_one else self._stage.part(table)

    def check_left_in_order(self) -> None:
        """Called when the training function has returned. Raises LoopError."""
        self._end_loop()
        if self._protected is None or self._loop is None:
            missing = "run.protect" if self._protected is None else "run.batches"
            raise LoopError(f"the training function returned without calling {missing}; see the README for the loop")
        if not self._entered:
            raise LoopError("the training function returned without iterating over what run.batches gave it")
        if self._left_in_step is not None:
            raise LoopError(
                f"the loop was left in the middle of step {self._left_in_step}; break only where run.committing is "
                "true, after optimizer.step(), and on what is equal on all ranks"
            )


class _At:
    """The data position as an object with a state, asked at a boundary."""

    def __init__(self, feed: Feed, team: Team) -> None:
        self._feed, self._team = feed, team

    def state_dict(self) -> dict[str, Any]:
        return self._feed.state_dict(data_position(self._team.step, self._team.skipped))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._feed.load_state_dict(state)


class _KnownBuffers:
    """Which buffers take part in the exchange: all ranks must agree."""

    def __init__(self, sums: StepSums) -> None:
        self._sums = sums

    def state_dict(self) -> dict[str, Any]:
        return {"names": list(self._sums.known_buffers)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if tuple(state["names"]) != self._sums.known_buffers:
            self._sums.widen(state["names"])
