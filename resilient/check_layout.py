"""A layout of `resilient check`, run by processes of this machine, and compared with the run in one process."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeAlias

from .check_rank import (
    Boundary,
    CheckedMember,
    Done,
    Dying,
    Entered,
    Go,
    Layout,
    Raised,
    There,
    Where,
    Work,
    begin,
    one_process,
    train,
)
from .check_state import Entry
from .core.limits import Limits
from .crew import Crew, Processes, Task

OUTPUT_LINES = 12
ANSWER_LIMIT_S = 1.0
LATE_LIMIT_S = 10.0
DETECTION_S = 4.0
"""Ranks that are ready wait for others that are starting fifteen times as long; a broken link is looked into after a
quarter of it."""

State: TypeAlias = Mapping[str, Entry]
FailureKind = Literal["exception", "died", "hangs"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    kind: FailureKind
    text: str
    detail: str = ""


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What became of a layout. states: by process and step."""

    states: dict[int, dict[int, Boundary]] = field(default_factory=dict)
    entered: Entered | None = None
    failure: Failure | None = None
    dying: set[int] = field(default_factory=set)
    """Processes that were killed on purpose."""
    seconds: float = 0.0

    @property
    def step(self) -> int:
        """In which it ended, if it failed."""
        return max((step + 1 for steps in self.states.values() for step in steps), default=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    step: int
    path: str
    expected: str
    found: str
    rank: int
    others: int
    """Paths that differ, too."""


def outcome_of(work: Work, quiet_s: float) -> Outcome:
    """Run it. quiet_s: how long nothing may come from its processes."""
    began = time.monotonic()
    outcome = _alone(work, quiet_s) if work.layout.ranks == 1 else _together(work, quiet_s)
    outcome.seconds = time.monotonic() - began
    return outcome


class _Listener:
    """Hears what the processes of a layout tell."""

    def __init__(self, work: Work, quiet_s: float, processes: Processes) -> None:
        self.work, self.outcome, self._processes = work, Outcome(), processes
        self.done: set[int] = set()
        self._limit_s, self._heard_at = quiet_s, time.monotonic()
        self._places: dict[int, str] | None = None
        """What each process does, once they have been asked since nothing came."""

    def hear(self, number: int, message: Any) -> None:
        match message:
            case Entered():
                self.outcome.entered = message
            case Boundary(step=step):
                self.outcome.states.setdefault(number, {})[step] = message
            case Done():
                self.done.add(number)
            case Dying():
                self.outcome.dying.add(number)
            case Raised(error=error, traceback=text):
                self.fail("exception", error, text + self.printed(number))
            case There(stack=stack) if self._places is not None:
                self._places[number] = stack
                return
            case _:
                return
        self._heard_at = time.monotonic()

    def died(self, number: int) -> None:
        if number not in self.outcome.dying:
            self.fail("died", f"process {number} has ended by itself", self.printed(number))

    def fail(self, kind: FailureKind, text: str, detail: str = "") -> None:
        """The first failure counts."""
        if self.outcome.failure is None:
            self.outcome.failure = Failure(kind=kind, text=text, detail=detail)

    @property
    def quiet_s(self) -> float:
        """How long nothing has come."""
        return time.monotonic() - self._heard_at

    def over(self) -> bool:
        """Whether it has failed. Asked after each tick."""
        quiet_s = self.quiet_s
        if quiet_s > self._limit_s and self._places is None:
            self._places = {}
            for number in self._processes.all:
                self._processes.send(number, Where())
        if quiet_s > self._limit_s + ANSWER_LIMIT_S:
            stacks = [f"process {number} is here:\n{stack}" for number, stack in sorted((self._places or {}).items())]
            self.fail("hangs", f"nothing has happened for {quiet_s:.0f} s", "".join(stacks))
        return self.outcome.failure is not None

    def printed(self, number: int) -> str:
        """The end of what a process has printed."""
        path = self.work.output(number)
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        return "".join(f"\nprinted: {line}" for line in lines[-OUTPUT_LINES:])


def _alone(work: Work, quiet_s: float) -> Outcome:
    with _processes() as processes:
        listener = _Listener(work, quiet_s, processes)
        processes.start(1, one_process, work)
        while not listener.done and not listener.over():
            for number, message in processes.receive():
                listener.died(number) if message is None else listener.hear(number, message)
        return listener.outcome


@contextmanager
def _processes() -> Iterator[Processes]:
    processes = Processes()
    try:
        yield processes
    finally:
        processes.close()


class _Several(Crew):
    def __init__(self, work: Work, quiet_s: float) -> None:
        ranks, kills = work.layout.ranks, work.layout.dies_in is not None
        settings = work.settings
        task = Task(
            train=partial(train, work),
            workers=(1 if kills else ranks, ranks),
            member=partial(CheckedMember, work),
            threads=settings.threads,
            begin=partial(begin, work),
        )
        limits = Limits(min_workers=task.workers[0], max_workers=ranks, detection_s=DETECTION_S)
        super().__init__(task, limits, room=ranks)
        self.listener, self._told, self._joined = _Listener(work, quiet_s, self.processes), 1, False

    def heard(self, member: int, message: Any) -> None:
        self.listener.hear(member, message)

    def gone(self, member: int) -> None:
        self.listener.died(member)
        super().gone(member)

    def over(self) -> bool:
        plan = self.plans[-1] if self.plans else None
        if plan is not None and plan.kind == "planned" and plan.generation > self._told:
            self._told, self._joined = plan.generation, self._joined or bool(plan.joiners)
            for member in plan.members:
                self.processes.send(member, Go(generation=plan.generation, joins=self._joined))
        if self.end is not None and self.end.outcome != "finished":
            self.listener.fail("exception", self.end.reason.strip().splitlines()[-1])
        return self.listener.over() or self._done()

    def _done(self) -> bool:
        """The replacement ends with the others, unless it has come too late to join them."""
        first = self.listener.work.layout.ranks
        missing = {*self.processes.all} - self.listener.outcome.dying - self.listener.done
        return not missing or (min(missing) > first and self.listener.quiet_s > LATE_LIMIT_S)


def _together(work: Work, quiet_s: float) -> Outcome:
    crew = _Several(work, quiet_s)
    try:
        crew.run(crew.over)
    finally:
        crew.close()
    return crew.listener.outcome


# Comparing


def left_elsewhere(reference: Outcome, outcome: Outcome, layout: Layout) -> str:
    """Which process has left the loop at another step than the one alone, if any has. Of the killed one, and of its
    replacement, nothing is expected."""
    last = max(reference.states[1])
    for number in sorted({*range(1, layout.ranks + 1)} - outcome.dying):
        reached = max(outcome.states.get(number, {}), default=-1)
        if reached != last:
            return f"the last step of process {number} was {reached}, and it is {last} in one process"
    return ""


def first_difference(reference: Outcome, outcome: Outcome) -> Difference | None:
    """Of plain values and counters before large tensors: they say more."""
    expected = reference.states[1]
    every = [boundary for steps in outcome.states.values() for boundary in steps.values()]
    held = {(each.step, path) for each in every for path, entry in each.state.items() if entry[0] is not None}
    spread = reference.entered is not None and reference.entered.stages > 1
    for boundary in sorted(every, key=lambda each: (each.step, each.rank)):
        step, rank, state = boundary.step, boundary.rank, boundary.state
        if step not in expected:
            continue
        right = expected[step].state
        paths = [path for path in {**right, **state} if _digest(right, path) != _digest(state, path)]
        if spread:  # what is not here may be on other ranks
            paths = [path for path in paths if _digest(state, path) is not None or (step, path) not in held]
        if paths:
            path = min(paths, key=lambda each: min(2, (right.get(each) or state[each])[2]))
            return Difference(
                step=step,
                path=path,
                expected=_shown(right, path),
                found=_shown(state, path),
                rank=rank,
                others=len(paths) - 1,
            )
    return None


def _digest(state: State, path: str) -> bytes | None:
    return state[path][0] if path in state else None


def _shown(state: State, path: str) -> str:
    return state[path][1] if path in state else "is not there"
