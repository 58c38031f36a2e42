"""What a process of `resilient check` does: it trains for some steps, and tells the state's bits after each of them."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from ray import cloudpickle

from .check_state import Entry, entries
from .core.plan import Plan
from .core.seat import Apply, Compute, Park
from .crew import TRAINING, Tell, attend, teller
from .job import Checkpoint, Settings
from .local_saving import LocalSaving
from .member import Member
from .team import Alone, Loop
from .worker import call, user_traceback

FRAMES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Entered:
    """A process has reached its loop."""

    micro_batches: int
    steps: int | None
    stages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Boundary:
    """The state after a step."""

    step: int
    rank: int
    state: Mapping[str, Entry]


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """All steps are done, or the training function has returned before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Raised:
    """An exception has left the training function. error: its type and text."""

    error: str
    traceback: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Dying:
    """This process kills itself now, as the layout has it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Go:
    """The controller wants this generation. joins: the replacement is in it, so that ranks need not wait any longer."""

    generation: int
    joins: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How the first steps are run.

    ranks: so many processes with a rank each; 1: one process, without others. backwards: it takes the micro-batches
    of a step in the opposite order. as_rank, as_size: what the one process tells the script of itself. dies_in: in the
    middle of this step one of the ranks is killed. resumes_at: the state at the start of this step comes from a
    checkpoint.
    """

    name: str
    ranks: int = 1
    backwards: bool = False
    as_rank: int = 0
    as_size: int = 1
    dies_in: int | None = None
    resumes_at: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What all processes of a layout have in common. saves_at: steps at whose start the one process saves its state
    under `folder`."""

    settings: Settings
    function: bytes
    layout: Layout
    steps: int
    folder: Path
    saves_at: tuple[int, ...] = ()

    def output(self, number: int) -> Path:
        return self.folder / f"{self.layout.name}-{number}.txt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Where:
    """Asks a process what it does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class There:
    """What the training thread does, as a traceback."""

    stack: str


class _Stop(BaseException):
    """Ends the training function where the last step has ended. No Exception, so that scripts don't catch it."""


class _Told:
    """What is the same in one process and in a rank."""

    work: Work
    told: Tell
    _loop: Loop | None
    step: int
    rank: int

    def entered(self, loop: Loop) -> None:
        stages = 1 if loop.shape is None else loop.shape.stages
        self.told(Entered(micro_batches=loop.sums.micro_batches, steps=loop.steps, stages=stages))

    def ended(self) -> None:
        """The step stands in the state, but is not left yet: nothing else reads or writes the state."""
        assert self._loop is not None
        self.told(Boundary(step=self.step, rank=self.rank, state=entries(self._loop.objects())))
        if self.step + 1 >= self.work.steps:
            raise _Stop


class _One(_Told, Alone):
    """One process does everything."""

    def enter(self, loop: Loop) -> None:
        self.entered(loop)
        super().enter(loop)

    def next(self) -> Compute | Apply | Park:
        todo = super().next()
        if isinstance(todo, Compute) and self.work.layout.backwards:
            return Compute(leaf=max(self._seat.work - self._seat.folded))
        return todo

    def applied(self, values: Mapping[int, Mapping[str, float]]) -> None:
        self.ended()
        super().applied(values)


class CheckedMember(_Told, Member):
    """A rank. The one that is to die does so while others are in the same step; from then on the others wait after each
    step for what the controller wants next: to a run of few steps the replacement would come too late."""

    def __init__(self, work: Work, host: Any, **kwargs: Any) -> None:
        self.work, self.told = work, host.tell
        self._waits, self._wanted = False, Go(generation=0, joins=False)
        super().__init__(host, **kwargs)

    def enter(self, loop: Loop) -> None:
        self.entered(loop)
        super().enter(loop)

    def folded(self, leaf: int) -> None:
        if self._is_last_moment and self.number == victim(self._plan):
            self.told(Dying())
            os.kill(os.getpid(), signal.SIGKILL)
        super().folded(leaf)

    @property
    def _plan(self) -> Plan:
        assert self._seat.plan is not None
        return self._seat.plan

    @property
    def _is_last_moment(self) -> bool:
        """Of the one that is to die. Without it the others go on in an unplanned generation."""
        return self.step == self.work.layout.dies_in and self._plan.kind != "unplanned"

    def applied(self, values: Mapping[int, Mapping[str, float]]) -> None:
        self.ended()
        if self.step == self.work.layout.dies_in:
            self._waits = not self._is_last_moment
        super().applied(values)
        if self._waits:
            self._wait()

    def _wait(self) -> None:
        """The parent ends this process if that takes too long."""
        with self._changed:
            while not (self._wanted.joins or self._wanted.generation > self.generation):
                self._changed.wait()

    def deliver(self, message: object) -> None:
        if isinstance(message, Go):
            with self._changed:
                self._wanted = message
                self._changed.notify_all()
        elif isinstance(message, Where):
            self.told(where())
        else:
            super().deliver(message)


def victim(plan: Plan) -> int | None:
    """The member to be killed: one whose state another has. Rank 0 where each has all of it."""
    teams = [stage.ranks for stage in plan.stages] or [tuple(range(plan.size))]
    return next((plan.members[ranks[0]] for ranks in teams if len(ranks) > 1), None)


class _Saving(LocalSaving):
    """Saves at chosen steps alone."""

    def __init__(self, work: Work) -> None:
        resume = work.layout.resumes_at
        url = str(work.folder / "checkpoints")
        checkpoint = Checkpoint(
            url, every=1, keep=work.steps, compression="none", resume="never" if resume is None else resume
        )
        super().__init__(checkpoint, work.settings.name)
        self._at = work.saves_at

    def boundary(self, step: int, last_step: int | None, objects: Mapping[str, object]) -> None:
        if step in self._at:
            super().boundary(step, last_step, objects)


# Processes


def one_process(pipe: Connection, number: int, work: Work) -> None:
    begin(work, number)
    torch.set_num_threads(work.settings.threads)
    tell = teller(pipe)
    threading.Thread(target=_train_alone, args=(work, tell), name=TRAINING, daemon=True).start()
    attend(pipe, lambda message: tell(where()), lambda: None)


def where() -> There:
    training = {each.ident for each in threading.enumerate() if each.name == TRAINING}
    stacks = [traceback.format_stack(frame) for thread, frame in sys._current_frames().items() if thread in training]
    return There(stack="".join(stacks[0][-FRAMES:]) if stacks else "")


def begin(work: Work, number: int) -> None:
    """What the script prints goes into a file."""
    file = os.open(work.output(number), os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.close(file)


def train(work: Work, member: CheckedMember, tell: Tell) -> None:
    _train(work, tell, lambda: member)


def _train_alone(work: Work, tell: Tell) -> None:
    layout = work.layout

    def team() -> _One:
        saves = work.saves_at or layout.resumes_at is not None
        one = _One(
            on_step=lambda step, values: None,
            saving=_Saving(work) if saves else None,
            workers=work.settings.workers,
            rank=layout.as_rank,
            size=layout.as_size,
        )
        one.work, one.told = work, tell
        return one

    _train(work, tell, team)


def _train(work: Work, tell: Tell, make_team: Callable[[], Any]) -> None:
    team: Any = None
    try:
        team = make_team()
        call(lambda: cloudpickle.loads(work.function), team, work.settings, torch.device("cpu"))
    except _Stop:
        pass
    except BaseException as error:  # noqa: BLE001  the thread's edge: whatever the user's code raises is told
        if error.__traceback__ is not None:
            error.__traceback__ = error.__traceback__.tb_next
        sys.stdout.flush()
        text = "".join(traceback.format_exception_only(error)).strip()
        tell(Raised(error=text, traceback=user_traceback(error)))
        return
    tell(Done())
