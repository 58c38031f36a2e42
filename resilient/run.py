"""`Run`: what a training function receives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor

from snapshot.capture import capture
from snapshot.core.digest import StatePart

from .batches import BatchesLoop, MicroBatchLoop, StepsLoop
from .buffers import kept_buffers
from .clipping import clip
from .core.order import derive_seed, whole
from .core.seat import Rollback
from .data import Feed
from .elementwise import check_elementwise
from .epochs import Epochs
from .errors import LoopError
from .gates import Reduced
from .loop import OnNonfinite, TrainingLoop
from .pipeline import Layer, Pipeline
from .pipeline_loop import PipelineLoop
from .protected import Protected
from .randomness import kept_generators, seed_everything
from .step import Step
from .team import Team


class Run:
    """One rank's view of a training run."""

    def __init__(
        self,
        team: Team,
        *,
        seed: int,
        device: torch.device,
        on_nonfinite: OnNonfinite = "ignore",
        same_bits: bool = True,
    ) -> None:
        self.state: dict[str, Any] = {}
        """Plain values that belong to the state: counters, histories. Captured with everything else."""
        self.device = device
        self._team = team
        self._seed = seed
        self._on_nonfinite, self._same_bits = on_nonfinite, same_bits
        self._protected: Protected | None = None
        self._pipeline: Pipeline | None = None
        self._loop: TrainingLoop | None = None
        self._epochs: Epochs | None = None
        seed_everything(derive_seed("function", seed))

    @property
    def committing(self) -> bool:
        """Whether the micro-batches of the step are done: gradients are reduced, and updates act.

        In a flat loop it is true in the iteration of the step's last micro-batch, from `backward` on. Raises LoopError
        where nobody can know yet: before backward, or before the loop over a step's micro-batches has ended.
        """
        return self._loop is not None and self._loop.is_committing()

    @property
    def step(self) -> int:
        """Number of the current step, from 0: the number of steps committed so far."""
        return self._team.step + (self._loop is not None and self._loop.left_after_commit)

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
        if self._pipeline is not None:
            raise ValueError("run.batches was called in a run with a pipeline; its loop is: for step in run.steps(...)")
        if self._epochs is not None:
            raise ValueError("run.batches was called within run.epochs; its loop is: for step in run.steps(...)")
        feed = self._feed(dataset, global_batch, micro_batch, steps, epochs, loader, what="run.batches")
        return self._begin(BatchesLoop, feed).begin()

    def _begin(self, kind: type[MicroBatchLoop], feed: Feed) -> TrainingLoop:
        assert self._protected is not None
        self._loop = kind(self._team, feed, self._protected, **self._loop_settings, former=self._loop)
        return self._loop

    @property
    def _loop_settings(self) -> dict[str, Any]:
        return {
            "seed": self._seed,
            "on_nonfinite": self._on_nonfinite,
            "values": self.state,
            "same_bits": self._same_bits,
        }

    def _feed(
        self,
        dataset: Any,
        global_batch: int,
        micro_batch: int,
        steps: int | None,
        epochs: int | None,
        loader: Mapping[str, Any],
        *,
        what: str,
    ) -> Feed:
        if self._protected is None:
            raise ValueError(f"{what} was called before run.protect; call protect(model=..., optimizer=...) first")
        number = self._end_former(what)
        feed = Feed(
            dataset,
            global_batch=global_batch,
            micro_batch=micro_batch,
            steps=steps,
            epochs=epochs,
            seed=derive_seed("data", self._seed, *([number] if number else [])),
            **loader,
        )
        if self._loop is not None and feed.micro_batches != self._loop.feed.micro_batches:
            raise ValueError(
                f"{what}: global_batch {global_batch} / micro_batch {micro_batch} are {feed.micro_batches} "
                f"micro-batches per step, but the loop before this one had {self._loop.feed.micro_batches}; all loops "
                "of a run need as many"
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

    def _end_former(self, what: str) -> int:
        """How many loops the run has had before the one that is to begin."""
        former = self._loop
        if former is None:
            return 0
        if self._pipeline is not None or self._epochs is not None:
            raise ValueError(f"{what} was called twice; a run with a pipeline, or with run.epochs, has one loop")
        if not former.entered or former.is_open:
            raise ValueError(f"{what} was called before the loop before it had ended; loops follow one another")
        former.returned()
        if former.left_in_step is not None:
            raise LoopError(left_too_early(former.left_in_step))
        return former.number + 1

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
        updates: int = 1,
        **loader: Any,
    ) -> Iterator[Step]:
        """The steps of the loop, each iterated over for this rank's micro-batches. Arguments as of `batches`.

            for step in run.steps(dataset, global_batch=64, micro_batch=8, epochs=8):
                for x, y in step:
                    loss_of(model(x), y).backward()
                optimizer.step(); optimizer.zero_grad()

        What follows the inner loop runs once per step on each rank, with the mean gradient over the global batch in
        `.grad`. A micro-batch may call backward several times; its loss is their sum. In a pipeline each step is given
        to `pipe.train_step(step)` instead, and a micro-batch is a pair (inputs, target).

        updates: so many steps go through the same global batch, `step.update` counts them: for two optimizers with
        losses of their own. Within `run.epochs` neither steps nor epochs are given: it is the epoch's.
        """
        loader = {"updates": updates, **loader}
        if self._epochs is not None:
            return self._epoch_steps(dataset, global_batch, micro_batch, steps, epochs, loader)
        return self._steps_loop(dataset, global_batch, micro_batch, steps, epochs, loader).begin()

    def epochs(self, count: int) -> Iterator[int]:
        """The passes through the data, by number: what follows the loop over an epoch's steps runs once per epoch.

            for epoch in run.epochs(8):
                for step in run.steps(dataset, global_batch=64, micro_batch=8):
                    ...
                with run.evaluating():
                    loss = validate(model)
                plateau.step(loss)

        A process that takes a lost one's place, or goes on from a checkpoint, begins with the epoch that the run is in;
        what stands before `run.steps` in its first epoch sees the number 0. Raises ValueError.
        """
        if self._epochs is not None or self._loop is not None:
            raise ValueError("run.epochs was called after a loop had begun; a run has one loop")
        self._epochs = Epochs(whole("run.epochs(count)", count))
        return cast(Iterator[int], iter(self._epochs))

    def _epoch_steps(self, *arguments: Any) -> Iterator[Step]:
        assert self._epochs is not None
        dataset, global_batch, micro_batch, steps, epochs, loader = arguments
        if steps is not None or epochs is not None:
            raise ValueError("run.steps within run.epochs takes neither steps nor epochs: it has those of one epoch")
        if self._loop is None:
            loop = self._steps_loop(dataset, global_batch, micro_batch, None, self._epochs.count, loader)
            if loop.feed.steps_per_epoch is None:
                raise ValueError(
                    "run.epochs: the dataset has no length, hence no epochs; use run.steps(..., steps=...)"
                )
            self._epochs.begin(loop, (dataset, global_batch, micro_batch, loader))
        self._epochs.check_same((dataset, global_batch, micro_batch, loader))
        return self._epochs.steps()

    def _steps_loop(self, *arguments: Any) -> TrainingLoop:
        feed = self._feed(*arguments, what="run.steps")
        if self._pipeline is None:
            return self._begin(StepsLoop, feed)
        assert self._protected is not None
        if all(module is not self._pipeline for _, module in self._protected.modules):
            raise ValueError("run.steps: the pipeline is not protected; pass it as protect(model=pipe, ...)")
        for name, optimizer in self._protected.optimizers if self._pipeline.shard_optimizer else ():
            check_elementwise(name, optimizer)
        if feed.steps == 1 and self._pipeline.stages > 1:
            raise ValueError("run.steps(steps=1): a pipeline of several stages trains for two steps at least")
        self._loop = PipelineLoop(self._pipeline, self._team, feed, self._protected, **self._loop_settings)
        return self._loop

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale the gradient so that its 2-norm over the whole model is at most `max_norm`; the norm before that.

        As `torch.nn.utils.clip_grad_norm_`, for pipelines too, on whatever ranks their layers are.
        """
        if self._protected is None:
            raise ValueError("run.clip_grad_norm_ was called before run.protect")
        loop = self._loop
        if loop is None or not loop.committing:
            return torch.tensor(float("nan"))
        if loop.untouched is not None:
            loop.untouched.check()
            loop.untouched = None
        return clip(self._protected.parameters, loop.norms, max_norm)

    def log(self, **values: float | Tensor) -> None:
        """Record values for this step. What each micro-batch logs is averaged over the step.

        The loss is recorded by itself, exactly, from the value that backward starts from.
        """
        if self._loop is None:
            raise LoopError("run.log was called outside the training loop; return values from the function instead")
        self._loop.log(values)

    def reduced(self, name: str) -> Reduced:
        """A value reduced over the whole step, equal on all ranks; "loss" is the one there is.

        In a committing iteration that of this step, before it that of the step before (NaN at first).
        """
        if name != "loss":
            raise ValueError(f'run.reduced({name!r}): only "loss" is reduced within the step')
        return Reduced(float("nan") if self._loop is None else self._loop.loss)

    def rollback(self, *, steps: int, why: str = "the training function asked for a rollback") -> None:
        """Go back by `steps` steps or more, to a snapshot, and leave out the data since: a loss spike, say.

        To be called in a committing iteration (see `committing`), on all ranks alike. The rest of the iteration
        runs as it would, and is then forgotten. The run ends with an error if there is no such snapshot.
        """
        if self._loop is None or not self._loop.committing:
            raise LoopError(
                "run.rollback was called outside of a committing iteration; decide where run.committing is "
                'true, on what is equal on all ranks, such as run.reduced("loss")'
            )
        if not (isinstance(steps, int) and 1 <= steps <= self.step + 1):
            raise ValueError(
                f"run.rollback(steps={steps!r}): is a whole number from 1 to {self.step + 1}, the steps so far"
            )
        self._loop.rollback = Rollback(
            back_to=self.step + 1 - steps,
            skip_from=None,
            skip_to=self._loop.position(self.step),
            why=f"step {self.step}: {why}",
        )

    @contextmanager
    def pause(self, reason: str) -> Iterator[None]:
        """Around work that makes no training progress, such as a long validation: not taken for a hang.

        A backward inside it is the user's own affair, and not the micro-batch's. Random numbers drawn inside change
        nothing outside, so that one rank may do it alone.
        """
        loop = self._loop
        was_paused = loop is not None and loop.paused
        self._team.pause(reason)
        if loop is not None:
            loop.paused = True
        try:
            with kept_generators(self.device):
                yield
        finally:
            if loop is not None:
                loop.paused = was_paused
            self._team.pause(reason if was_paused else None)

    @contextmanager
    def evaluating(self, reason: str = "evaluation") -> Iterator[None]:
        """Around validation, anywhere in the loop, on one rank or on all: training does not notice it.

        Protected modules are in eval mode, no gradients are recorded, and afterwards modes, buffers and random
        generators are as before. It counts as a pause. What each rank computes inside from the same data is equal on
        all of them, so that learning rates may depend on it; then all ranks have to do it.
        """
        if self._protected is None:
            raise ValueError("run.evaluating was called before run.protect")
        modules = [module for _, module in self._protected.modules]
        parts = list({id(part): part for module in modules for part in module.modules()}.values())
        training = [part.training for part in parts]
        with self.pause(reason), torch.no_grad(), kept_buffers(modules):
            try:
                for module in modules:
                    module.eval()
                yield
            finally:
                for part, mode in zip(parts, training, strict=True):
                    part.training = mode

    def digest(self) -> str | StatePart:
        """xxh3-128 of the bits of all that is protected, and of run.state: as the loop ended; before that, as it is."""
        assert self._protected is not None
        if self._loop is not None:
            return self._loop.final or self._loop.digest()
        return capture({f"user:{name}": thing for name, thing in self._protected.objects.items()}).digest()

    def check_left_in_order(self) -> None:
        """Called when the training function has returned. Raises LoopError."""
        if self._loop is not None:
            self._loop.returned()
        if self._protected is None or self._loop is None:
            missing = "run.protect" if self._protected is None else "run.steps or run.batches"
            raise LoopError(f"the training function returned without calling {missing}; see the README for the loop")
        if not self._loop.entered:
            raise LoopError(
                "the training function returned without iterating over what run.steps or run.batches gave it"
            )
        if self._loop.left_in_step is not None:
            raise LoopError(left_too_early(self._loop.left_in_step))


def left_too_early(step: int) -> str:
    return (
        f"the loop was left in the middle of step {step}; break only after optimizer.step(), behind the loop over the "
        "step's micro-batches or where run.committing is true, and on what is equal on all ranks"
    )
