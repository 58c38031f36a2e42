"""What a training loop needs from the ranks around it, and the simplest team: oneself alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from actors.post import Post

from .core.events import PipelineShape
from .core.plan import Address, Place, Plan, Stage
from .core.planner import dealt_anew
from .core.schedule import Action
from .core.seat import (
    Applied,
    Apply,
    Compute,
    ExchangeDone,
    Finished,
    Formed,
    GoesOn,
    LeafFolded,
    Park,
    PlanArrived,
    Reduce,
    Rollback,
    Seat,
)
from .core.staging import Staging
from .errors import LoopError
from .exchange import exchange_alone
from .records import RecentLosses, mean_values
from .sums import StepSums

if TYPE_CHECKING:
    from .local_saving import LocalSaving
    from .stage_side import StageSide


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """What a rank brings when it reaches its training loop."""

    sums: StepSums
    steps: int | None
    objects: Callable[[], Mapping[str, object]]
    """Everything that makes up the state, by name; captured and loaded at a step boundary."""
    control: Callable[[], int]
    """A digest, in [0, 2**62), of what must be equal on all ranks in every step: learning rates, flags, counters."""
    control_state: Callable[[], dict[str, object]]
    """What the digest is of, by path."""
    leave: Callable[[], None]
    """Take off all that the loop has put around torch and the user's objects, wherever it stands: the step in hand is
    given up."""
    ended_with: Callable[[], Mapping[str, str]] = dict
    """Of each object in the state that the loop ended with, by name, the digest."""
    stage: StageSide | None = None
    """Of a pipeline, what this rank holds of it."""
    shape: PipelineShape | None = None


class Team(Protocol):
    """The ranks of a run, seen from one of them. All methods are called by the training thread."""

    rank: int
    size: int
    generation: int
    step: int
    workers: tuple[int, int]
    reduction: Literal["exact", "fast"]
    skipped: tuple[int, ...]
    """Positions in the data that are left out, ascending."""

    def enter(self, loop: Loop) -> None:
        """Be seated, with the state that the others have. Blocks."""

    def go_on(self, loop: Loop) -> None:
        """After a loop that has finished another one begins."""

    def next(self) -> Compute | Apply | Park:
        """What to do now. Blocks while others must act first."""

    def park(self) -> None:
        """The user's code has been left, the step dropped. Blocks until a snapshot has taken its place."""

    def next_of(self, choose: Callable[[frozenset[int]], Action | None]) -> Action | Apply | Park:
        """The same for a stage of a pipeline. choose: of own micro-batches that are not folded yet, what is ready to be
        done; asked again whenever something has come from other stages."""

    def wait_for(self, ready: Callable[[], bool]) -> bool:
        """Blocks until this is so; asked again whenever something has come from other ranks. False if the step is to be
        given up meanwhile."""

    def parked(self) -> bool:
        """Whether the step is to be given up, and `park` called."""

    def post(self) -> Post | None:
        """What a pipeline's stages send each other goes over this; None where there are no others."""

    def leaves(self) -> tuple[int, ...]:
        """The micro-batches this rank owns in this and the following steps, as far as is known."""

    def folded(self, leaf: int) -> None: ...

    def applied(self, values: Mapping[int, Mapping[str, float]]) -> None:
        """The loop is back for its next micro-batch after a commit; with what it logged, by micro-batch."""

    def roll_back(self, rollback: Rollback) -> None:
        """Ask to go back, in the place of a step's end. `next` then says to park."""

    def finished(self) -> bool:
        """The loop has ended. False if meanwhile a snapshot is to take the state's place: it goes on."""

    def committed(self, losses: list[float]) -> None:
        """A step's result has been applied to `.grad`; its losses by micro-batch."""

    def pause(self, reason: str | None) -> None:
        """Begin (or with None, end) a stretch in which no progress is expected."""


@dataclass(slots=True, kw_only=True)
class Alone:
    """One process does all micro-batches: the reference for every 'identical'."""

    on_step: Callable[[int, dict[str, float]], None]
    saving: LocalSaving | None = None
    rank: int = 0
    size: int = 1
    generation: int = 1
    workers: tuple[int, int] = (1, 1)
    reduction: Literal["exact", "fast"] = "exact"
    skipped: tuple[int, ...] = ()
    _seat: Seat = field(default_factory=lambda: Seat(member=1))
    _loop: Loop | None = None
    _losses: list[float] = field(default_factory=list)
    _recent: RecentLosses = field(default_factory=RecentLosses)

    @property
    def step(self) -> int:
        return self._seat.step

    def enter(self, loop: Loop) -> None:
        self._loop = loop
        step = 0
        if loop.stage is not None:
            if loop.stage.shards is not None:
                loop.stage.shards.deal(self._plan())
            loop.stage.bring(self._plan(), 0, initial=True)
        if self.saving is not None:
            step, self.skipped = self.saving.resume(self._objects())
        self._sit_down(step)

    def go_on(self, loop: Loop) -> None:
        self._loop = loop
        self._seat.handle(GoesOn(step=self._seat.step))

    def _objects(self) -> Mapping[str, object]:
        assert self._loop is not None
        return {**self._loop.objects(), "run.losses": self._recent}

    def _sit_down(self, step: int) -> None:
        plan = self._plan()
        self._seat = Seat(member=1, step=step, complete=step - 1)
        self._seat.handle(PlanArrived(plan=plan))
        if self._loop is not None and self._loop.stage is not None:
            self._loop.stage.settle(plan, 0)
        self._seat.handle(Formed(generation=1, complete=step - 1))

    def _plan(self) -> Plan:
        assert self._loop is not None
        shape = self._loop.shape
        place = Place(member=1, node="here", address=Address(host="", port=0))
        return dealt_anew(
            generation=1,
            base=0,
            kind="initial",
            places=[place],
            joiners=[],
            micro_batches=self._loop.sums.micro_batches,
            reason="a run in one process",
            staging=_all_layers(len(shape.layer_bytes), self._loop.sums.micro_batches) if shape else None,
        )

    def leaves(self) -> tuple[int, ...]:
        assert self._seat.plan is not None
        return self._seat.plan.leaves[0]

    def next(self) -> Compute | Apply | Park:
        assert self._loop is not None
        todo = self._seat.next()
        if isinstance(todo, Reduce):
            self._loop.sums.accept(exchange_alone(self._loop.sums))
            self._seat.handle(ExchangeDone(generation=1, step=todo.step, agreed=1))
            todo = self._seat.next()
        assert isinstance(todo, Compute | Apply), todo
        return todo

    def next_of(self, choose: Callable[[frozenset[int]], Action | None]) -> Action | Apply | Park:
        todo = self.next()
        if not isinstance(todo, Compute):
            return todo
        action = choose(self._seat.work - self._seat.folded)
        assert action is not None, "one process has all that it needs"
        return action

    def roll_back(self, rollback: Rollback) -> None:
        """Only what was asked for by itself: the state has not been touched by the step, so it stays."""
        if rollback.skip_from is None:
            raise LoopError(f"{rollback.why}, but a run in one process keeps no snapshots to go back to")
        self.skipped = tuple(sorted({*self.skipped, *range(rollback.skip_from, rollback.skip_to + 1)}))
        if self.saving is not None:
            self.saving.left_out(self._seat.step, self.skipped)
        self._sit_down(self._seat.step)

    def park(self) -> None:
        raise AssertionError("a run in one process never parks")

    def wait_for(self, ready: Callable[[], bool]) -> bool:
        assert ready(), "one process waits for nobody"
        return True

    def parked(self) -> bool:
        return False

    def post(self) -> Post | None:
        return None

    def folded(self, leaf: int) -> None:
        self._seat.handle(LeafFolded(step=self._seat.step, leaf=leaf))

    def applied(self, values: Mapping[int, Mapping[str, float]]) -> None:
        step = self._seat.step
        self._seat.handle(Applied(step=step))
        self._recent.add(step, mean(self._losses))
        self.on_step(step, {"loss": mean(self._losses), **mean_values(values)})
        assert self._loop is not None
        self._loop.sums.forget()  # nobody will ask for the result
        if self.saving is not None:
            self.saving.boundary(step + 1, self._loop.steps, self._objects())

    def finished(self) -> bool:
        self._seat.handle(Finished(step=self._seat.step))
        if self.saving is not None:
            self.saving.save_newest()
        return True

    def committed(self, losses: list[float]) -> None:
        self._losses = losses

    def pause(self, reason: str | None) -> None:
        pass

    def close(self) -> None:
        """This process goes on without the run: nothing of its loop may stay."""
        if self._loop is not None:
            self._loop.leave()
        if self.saving is not None:
            self.saving.save_newest()
        self._loop = None


def _all_layers(layers: int, micro_batches: int) -> Staging:
    return Staging(
        seated=(1,),
        stages=(Stage(first=0, stop=layers, ranks=(0,)),),
        leaves=(tuple(range(micro_batches)),),
        step_s=0.0,
        reason="",
    )


def mean(values: list[float]) -> float:
    return sum(values) / len(values)
