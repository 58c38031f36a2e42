"""What stands around the user's loop body, whatever is iterated over: steps begin, are committed, refused, left."""

from __future__ import annotations

import inspect
import os
import weakref
from collections.abc import Generator, Mapping
from typing import Any, Literal

import torch

from snapshot.capture import capture
from snapshot.core.branches import data_position
from snapshot.core.digest import StatePart
from snapshot.load import load
from snapshot.table import StateTable, copied

from .clipping import Untouched
from .core.order import derive_seed
from .core.seat import Rollback
from .data import Feed
from .errors import LoopError
from .gates import Gates
from .loading import shown_name
from .positions import DataPosition, KnownBuffers
from .protected import Protected
from .randomness import seed_everything
from .stage_side import StageSide
from .state_watch import StateWatch, digest_of
from .step import Step
from .sums import StepSums
from .team import Loop, Team, mean

WHOLE_STEP = -1
"""In the place of a micro-batch, for what is logged once per step."""
MOST_REFUSALS = 3
"""So many times in a row a step's data is left out because it was not finite; then the run stops."""
OnNonfinite = Literal["ignore", "stop", "skip", "rollback"]


class TrainingLoop:
    """One rank's. Begun when it is iterated over."""

    gates: Gates
    sums: StepSums

    def __init__(
        self,
        team: Team,
        feed: Feed,
        protected: Protected,
        *,
        seed: int,
        on_nonfinite: OnNonfinite,
        values: dict[str, Any],
        same_bits: bool = True,
        former: TrainingLoop | None = None,
    ) -> None:
        """values: `run.state`. same_bits: whether all machines compute the same bits, so that what the script has made
        of them is compared; learning rates and the like are in any case. former: the run's loop before this one, which
        has ended."""
        self.team, self.feed, self.protected, self.seed = team, feed, protected, seed
        self.committing = False
        """Whether this iteration is the last of its step: gradients are reduced, and updates act."""
        self.leaf: int | None = None
        """The micro-batch in hand, by which is known what was logged for which; None if there is none."""
        self.asked_committing = False
        """Whether the user's code has asked in this iteration if the micro-batch is the step's last."""
        self.skipping = False
        """Whether the present step goes by without an update."""
        self.paused = False
        self.entered = False
        self.left_in_step: int | None = None
        self.left_after_commit = self.left_at_boundary = False
        self.final_objects: dict[str, str] = {}
        """Digests of its objects, by name."""
        self.final: str | StatePart | None = None
        """Digest of the state that the loop ended with. What the function does afterwards may differ between ranks:
        rank 0 alone evaluates, say."""
        self.rollback: Rollback | None = None
        """Asked for in this step."""
        self.logged: dict[int, dict[str, float]] = {}
        self.loss = float("nan")
        """The mean of the last committed step; while one is committed, of that."""
        self.norms: dict[str, float] | None = None
        """Of the mean gradients of the step that is being committed, if some of them are on other ranks."""
        self.untouched: Untouched | None = None
        self.stage: StageSide | None = None
        self._iterator: weakref.ref[Generator[Any, None, None]] | None = None
        self._values, self._on_nonfinite, self._same_bits = values, on_nonfinite, same_bits
        self.watch = StateWatch(self.compared())
        self.former = former
        self.number: int = 0 if former is None else former.number + 1
        self.begun: list[int] = [0] if former is None else former.begun
        """At which steps the run's loops have begun, this one's and perhaps further ones'."""
        self.later: Mapping[str, Any] | None = None
        """The position in the data, if the run is in a later loop."""
        self.to_repeat: StateTable | None = None
        """The state that this process came to hold when it passed this loop by, since the run is in a later one."""
        self._refused = (-1, 0)
        """The last step that was not finite, and with how much data in a row."""

    def iterate(self) -> Generator[Any, None, None]:
        raise NotImplementedError

    def micro_batches(self, step: Step) -> Generator[Any, None, None]:
        raise NotImplementedError

    def watched(self) -> dict[str, object]:
        """All that the user has handed over, by its names in a capture."""
        return {"run.state": self._values, **{f"user:{name}": thing for name, thing in self.protected.objects.items()}}

    def digest(self) -> str | StatePart:
        """xxh3-128 of the bits of all that; of a stage what it has to give to it."""
        table = capture(self.watched())
        return table.digest() if self.stage is None or self.stage.is_only_one else self.stage.part(table)

    def end_with_this(self) -> None:
        """The loop ends with the state as it is."""
        self.final = self.digest()
        if self.stage is None:
            objects = self.watched().items()
            self.final_objects = {shown_name(name): capture({name: thing}).digest() for name, thing in objects}

    def compared(self) -> Mapping[str, object]:
        """Whatever of that has the same plain values on all ranks."""
        return self.watched()

    def is_committing(self) -> bool:
        """For the user's code. Raises LoopError where it can't be known yet."""
        self.asked_committing = True
        return self.committing

    def begin(self) -> Generator[Any, None, None]:
        """What the user iterates over. Held by the user alone, so that a break ends it at once."""
        iterator = self.iterate()
        self._iterator = weakref.ref(iterator)
        return iterator

    @property
    def is_open(self) -> bool:
        """Whether the user still iterates over it."""
        iterator = self._iterator() if self._iterator is not None else None
        return iterator is not None and inspect.getgeneratorstate(iterator) != inspect.GEN_CLOSED

    def close(self) -> None:
        """Leave the loop now, although the user or a traceback still holds its iterator."""
        iterator = self._iterator() if self._iterator is not None else None
        if iterator is not None:
            iterator.close()

    @property
    def step(self) -> int:
        return self.team.step

    def brought(self) -> Loop:
        def objects() -> Mapping[str, object]:
            return {
                **self.watched(),
                "run.data": DataPosition(self),
                "run.buffers": KnownBuffers(self.sums),
            }

        return Loop(
            sums=self.sums,
            steps=None if self.feed.steps is None else self.first + self.feed.steps,
            objects=objects,
            control=self.control,
            control_state=self.control_state,
            leave=self.close,
            ended_with=lambda: self.final_objects,
        )

    def control(self) -> int:
        """A digest of what must be equal on all ranks, in [0, 2**62)."""
        if self._same_bits:
            return self.watch.digest()
        return digest_of(self.protected.control_state())

    def control_state(self) -> dict[str, object]:
        """What the digest is of, by path."""
        return self.watch.plain_values() if self._same_bits else self.protected.control_state()

    # Several loops, one after the other

    def enter(self) -> None:
        """Be seated; or, in a loop that follows another, go on."""
        if self.former is None:
            groups = self.protected.groups()
            self.team.enter(self.brought())
            if self._is_passed:
                self.to_repeat = copied(capture(self.brought().objects()))
                self.protected.set_groups(groups)  # what comes between loops adds them once more
        else:
            if len(self.begun) == self.number:
                self.begun.append(self.step)
            self.team.go_on(self.brought())
            self.to_repeat, self.former = self.former.to_repeat, None
            if self.to_repeat is not None and not self._is_passed:
                load(self.brought().objects(), self.to_repeat)
                self.to_repeat = None
        self.begin_step()

    @property
    def _is_passed(self) -> bool:
        """Whether the run is in a later loop, and what the user's code does between was done long ago."""
        return self.number + 1 < len(self.begun) and self.step > self.begun[self.number + 1]

    def finished(self) -> bool:
        """The loop is over. False if meanwhile a snapshot is to take the state's place: it goes on."""
        if not self.team.finished():
            return False
        self.end_with_this()
        return True

    @property
    def first(self) -> int:
        """The step that this loop begins with."""
        return self.begun[self.number]

    def has_more(self) -> bool:
        if self.number + 1 < len(self.begun) and self.step >= self.begun[self.number + 1]:
            return False
        self.feed.leave_out(sum(position >= self._base for position in self.team.skipped))
        steps = self.feed.steps
        return (steps is None or self.step < self.first + steps) and self.feed.has_step(self.position(self.step))

    @property
    def _base(self) -> int:
        """The position that this loop's data begins with."""
        return data_position(self.first - 1, self.team.skipped) + 1 if self.first else 0

    def position(self, step: int) -> int:
        """Which position in this loop's data the step trains on."""
        return data_position(step, self.team.skipped) - self._base

    def epoch_of(self, step: int) -> int:
        """By the number of steps, also where data was left out. Raises LoopError for a stream."""
        per_epoch = self.feed.steps_per_epoch
        if per_epoch is None:
            raise LoopError("a stream has no epochs: the dataset has no length")
        return (step - self.first) // per_epoch

    def ends_epoch(self, step: int) -> bool:
        return self.feed.steps_per_epoch is not None and self.epoch_of(step) != self.epoch_of(step + 1)

    @property
    def logs_to(self) -> int | None:
        """The micro-batch that values are logged for, `WHOLE_STEP`, or None outside of the loop."""
        return self.leaf

    # A step's begin and end

    def begin_step(self) -> None:
        """The state at a step's start stands."""
        self.sums.buffers.begin_step()
        self.watch.begin_step()

    def commit(self) -> None:
        """The step's result is here: from it come `.grad` and buffers, and updates act."""
        if self._on_nonfinite != "ignore" and not self.sums.is_finite(gradients=not self.gates.scaled):
            self._refuse()
            return
        losses = self.sums.apply()
        self.team.committed(losses)
        self.loss = mean(losses)
        self.committing = True
        self.gates.open = True
        seed_everything(derive_seed("commit", self.seed, self.step))

    @property
    def checks_finite(self) -> bool:
        return self._on_nonfinite != "ignore"

    def _refuse(self) -> None:
        """The step's loss or gradient is not finite: nothing of it reaches the state."""
        losses = self.sums.losses()
        what = f"the loss or gradient of step {self.step} is not finite (loss {mean(losses)})"
        if self._on_nonfinite == "stop":
            raise LoopError(f'{what}; on_nonfinite="skip" or "rollback" would go on without this step\'s data')
        position = data_position(self.step, self.team.skipped)
        if self._on_nonfinite == "rollback":
            self._refused = (self.step, self._refused[1] + 1 if self._refused[0] == self.step else 1)
            if self._refused[1] > MOST_REFUSALS:
                raise LoopError(f"{what}, nor was it with the data of {MOST_REFUSALS} others: the state itself is bad")
            self.rollback = Rollback(back_to=self.step, skip_from=position, skip_to=position, why=what)
        else:
            self.skipping = True
            leaf = self.logs_to
            assert leaf is not None
            self.logged.setdefault(leaf, {})["skipped"] = 1.0
            self.team.committed(losses)

    def check_stepped(self) -> None:
        """The user's code has come to the end of an iteration."""
        if self.committing and not self.gates.stepped:
            raise LoopError(
                f"step {self.step} was committed without optimizer.step() of an optimizer that was protected; call it "
                "in every iteration: it acts once per step, when the gradients of all micro-batches have been added "
                "up (do not accumulate by hand, choose micro_batch and global_batch instead). To leave an update out, "
                "call zero_grad() before optimizer.step()"
            )

    def end_iteration(self) -> None:
        """Go back, or on to the next step, if either is due."""
        self.gates.close()
        if self.rollback is not None:
            wanted = self.rollback
            self.drop_step()
            self.team.roll_back(wanted)
        elif self.committing or self.skipping:
            self._cross_boundary()

    def _cross_boundary(self) -> None:
        logged, self.logged = self.logged, {}
        self.committing = self.skipping = False
        self.leaf = None
        self.begin_step()
        self.team.applied(logged)

    # Otherwise

    def park(self) -> None:
        """Drop what this step has come to, and go on from the snapshot that takes the state's place."""
        self.drop_step()
        self.team.park()
        if self.number and self.step <= self.first:
            os._exit(1)  # in an earlier loop, which the user's code has left: another process takes this one's place
        self.begin_step()  # in a pipeline other layers may be here than before

    def drop_step(self) -> None:
        self.leaf, self.committing, self.skipping, self.rollback = None, False, False, None
        self.logged = {}
        self.sums.forget()

    def leave(self) -> None:
        """The user's code has left the loop: by break, in good order right after a commit, or by an exception.

        Nobody can tell which: so the step ends when the function returns. After an exception it may be half done.
        """
        self.left_after_commit = self.committing and self.gates.stepped
        if self.left_after_commit:
            self.end_with_this()
        else:
            self.left_in_step = self.step
        self.team.pause("the loop was left")

    def returned(self) -> None:
        """The user's function has."""
        self.close()
        to_finish = self.left_after_commit or self.left_at_boundary
        if self.left_after_commit:
            self.left_after_commit = False
            self._cross_boundary()
        parked = self.left_in_step is not None and self.team.parked()
        if parked or (to_finish and not self.team.finished()):
            os._exit(1)  # the user's code can't be gone back to: another process takes this one's place

    def end(self) -> None:
        """Nothing of the loop stays."""
        self.leaf = None
        self.gates.take_off()
        self.feed.close()

    def log(self, values: Mapping[str, float | torch.Tensor]) -> None:
        leaf = self.logs_to
        if leaf is None:
            raise LoopError("run.log was called outside the training loop; return values from the function instead")
        if "step" in values:
            raise ValueError(
                f"run.log(step={values['step']!r}): every row has its step already; log it by another name"
            )
        mine = self.logged.setdefault(leaf, {})
        for name, value in values.items():
            if name != "loss":
                mine[name] = float(value.detach() if isinstance(value, torch.Tensor) else value)
