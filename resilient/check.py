"""`resilient check`: the first steps of a training function in every layout that a cluster may bring, on this machine.

One process is the reference. Where another layout has other bits, experiments find out which kind of mistake it is:
the same once more (not deterministic), the micro-batches of each step in the opposite order (something is carried from
one to the next), one process that takes itself for another rank (something is done on one rank alone).
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from .check_causes import Cause, cause_of
from .check_rank import (
    Boundary,
    CheckedMember,
    Done,
    Dying,
    Entered,
    Entry,
    Go,
    Layout,
    Raised,
    Work,
    begin,
    one_process,
    train,
)
from .check_report import CheckReport, Finding, LayoutResult
from .core.limits import Limits
from .crew import Crew, Processes, Task
from .job import Settings

LEAST_STEPS = 4
"""A death, the replacement's arrival, and a step with it take three."""
MOST_RANKS = 5
SETUP_LIMIT_S = 600.0
QUIET_LIMIT_S = 60.0
OUTPUT_LINES = 12
START_TOGETHER_S = 20.0

Progress = Callable[[str], None]
State = dict[str, Entry]


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What became of a layout. states: by member and step. replaced: whether the killed rank's replacement trained."""

    states: dict[int, dict[int, Boundary]] = field(default_factory=dict)
    entered: Entered | None = None
    failure: tuple[str, str, str] | None = None
    """Kind, in a line, and more."""
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


class Check:
    def __init__(self, settings: Settings, function: bytes, steps: int, progress: Progress = lambda text: None) -> None:
        if not (isinstance(steps, int) and not isinstance(steps, bool) and steps >= LEAST_STEPS):
            raise ValueError(f"check(steps={steps!r}): is a whole number of steps, {LEAST_STEPS} or more")
        rollback = settings.on_nonfinite == "rollback"  # there are no snapshots here to go back to
        self._settings = replace(settings, on_nonfinite="skip") if rollback else settings
        self._function, self._steps, self._progress = function, steps, progress
        self._quiet_s = SETUP_LIMIT_S
        self._outcomes: dict[str, Outcome] = {}
        self._reference = Outcome()
        self._results: list[LayoutResult] = []
        self._failed: dict[str, tuple[Layout, Outcome, Difference | None]] = {}

    def run(self) -> CheckReport:
        with tempfile.TemporaryDirectory(prefix="resilient-check-") as folder:
            self._folder = Path(folder)
            if self._run_reference():
                for layout, why_not in self._layouts():
                    self._try(layout, why_not)
            findings = tuple(self._findings())
        return CheckReport(passed=not findings, layouts=tuple(self._results), findings=findings)

    # Layouts

    def _run_reference(self) -> bool:
        """Whether there is anything to compare others with."""
        layout = Layout(name="one process")
        saves_at = tuple(sorted({self._steps // 2, self._steps - 1}))
        self._reference = outcome = self._outcome(layout, saves_at)
        made = len(outcome.states.get(1, {}))
        if outcome.failure is None and made < LEAST_STEPS:
            text = f"the loop has only {made} steps, and a check takes {LEAST_STEPS} or more"
            outcome.failure = ("exception", text, "")
        if outcome.failure is not None:
            self._failed[layout.name] = (layout, outcome, None)
        self._add(layout, outcome, steps=made, ok=outcome.failure is None)
        self._steps = min(self._steps, made)
        self._quiet_s = max(QUIET_LIMIT_S, 5 * outcome.seconds)
        return outcome.failure is None

    def _layouts(self) -> Iterator[tuple[Layout, str]]:
        """Each with the reason why it can't be, or none."""
        entered, steps = self._reference.entered, self._steps
        assert entered is not None
        count, stages = entered.micro_batches, entered.stages
        most = count * stages
        single = "a step has 1 micro-batch" if count == 1 else ""
        yield Layout(name="one process again"), ""
        if self._failed:
            return  # no layout can be told from another
        pipeline = "a pipeline orders its micro-batches by itself" if stages > 1 else ""
        yield Layout(name="micro-batches in the opposite order", backwards=True), single or pipeline
        sizes = [2, 3]
        if all(count % size == 0 for size in sizes):
            sizes.append(next((size for size in range(4, MOST_RANKS + 1) if count % size), 0))
        for size in filter(None, sizes):
            uneven = " (uneven)" if stages == 1 and size < count and count % size else ""
            yield Layout(name=f"{size} ranks{uneven}", ranks=size), _too_many(size, most, count)
        killed = 2 if stages == 1 else stages + 1
        kill = Layout(name=f"{killed} ranks, one killed and replaced", ranks=killed, dies_in=steps - 3)
        yield kill, _too_many(killed, most, count)
        for step in sorted({steps // 2, steps - 1}):
            yield Layout(name=f"stopped after {step} steps and resumed", resumes_at=step), ""

    def _try(self, layout: Layout, why_not: str) -> None:
        if why_not:
            self._results.append(LayoutResult(name=layout.name, note=f"not possible: {why_not}"))
            return
        outcome = self._outcome(layout)
        difference = first_difference(self._reference, outcome)
        note = _short_of(layout, outcome)
        compared = max(map(len, outcome.states.values()), default=0)
        bad = outcome.failure is not None or difference is not None
        if bad:
            self._failed[layout.name] = (layout, outcome, difference)
        self._add(layout, outcome, steps=compared, ok=not bad, note=note)

    def _add(self, layout: Layout, outcome: Outcome, *, steps: int, ok: bool, note: str = "") -> None:
        self._results.append(
            LayoutResult(name=layout.name, steps=steps, seconds=round(outcome.seconds, 2), ok=ok, note=note)
        )

    def _outcome(self, layout: Layout, saves_at: tuple[int, ...] = ()) -> Outcome:
        self._progress(f"{layout.name} ...")
        work = Work(
            settings=self._settings,
            function=self._function,
            layout=layout,
            steps=self._steps,
            folder=self._folder,
            saves_at=saves_at,
        )
        began = time.monotonic()
        outcome = (_one if layout.ranks == 1 else _several)(work, self._quiet_s)
        outcome.seconds = time.monotonic() - began
        return outcome

    # Findings

    def _findings(self) -> Iterator[Finding]:
        for layout, outcome, difference in self._failed.values():
            cause = cause_of(layout, {name: each[0] for name, each in self._failed.items()}, self._differs)
            if difference is not None:
                yield _differing(layout, difference, cause)
            if outcome.failure is not None:
                yield self._failing(layout, outcome, cause)

    def _differs(self, layout: Layout) -> bool:
        """An experiment, made once at most."""
        if layout.name not in self._outcomes:
            self._outcomes[layout.name] = self._outcome(layout)
        outcome = self._outcomes[layout.name]
        return outcome.failure is not None or first_difference(self._reference, outcome) is not None

    def _failing(self, layout: Layout, outcome: Outcome, cause: Cause) -> Finding:
        assert outcome.failure is not None
        kind, text, detail = outcome.failure
        kinds: Any = kind
        alone = layout.name == "one process"
        return Finding(
            kind=kinds,
            layout=layout.name,
            step=outcome.step,
            path="",
            values={"error": text},
            cause="it is the script's own, in one process without others" if alone else cause.cause,
            remedy="as the error says" if alone else cause.remedy,
            detail=detail,
        )


def _differing(layout: Layout, found: Difference, cause: Cause) -> Finding:
    where = f"{layout.name}, rank {found.rank}" if layout.ranks > 1 else layout.name
    return Finding(
        kind="bits",
        layout=layout.name,
        step=found.step,
        path=found.path,
        others=found.others,
        values={"one process": found.expected, where: found.found},
        cause=cause.cause,
        remedy=cause.remedy,
    )


def _too_many(ranks: int, most: int, micro_batches: int) -> str:
    if ranks <= most:
        return ""
    return f"with {micro_batches} in a step, there are micro-batches for no more than {most}"


def _short_of(layout: Layout, outcome: Outcome) -> str:
    if layout.dies_in is None or outcome.failure is not None:
        return ""
    if len(outcome.states) <= layout.ranks:
        return "the replacement came too late to train; more steps would show it"
    return ""


# Comparing


def first_difference(reference: Outcome, outcome: Outcome) -> Difference | None:
    """Of plain values and counters before large tensors: they say more."""
    expected = reference.states[1]
    every = [(boundary.step, boundary.rank, boundary.state) for steps in outcome.states.values() for boundary in steps.values()]
    for step, rank, state in sorted(every, key=lambda each: each[:2]):
        if step not in expected:
            continue
        right = dict(expected[step].state)
        paths = [path for path in {**right, **state} if _digest(right, path) != _digest(state, path)]
        paths = [path for path in paths if path not in state or state[path][0] is not None]
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


def _digest(state: Any, path: str) -> bytes | None:
    return state[path][0] if path in state else b"missing"


def _shown(state: Any, path: str) -> str:
    return str(state[path][1]) if path in state else "is not there"


# Running


class _Hung(Exception):
    """Nothing has come for too long."""


class _Listener:
    """Hears what the processes of a layout tell."""

    def __init__(self, work: Work, quiet_s: float) -> None:
        self.work, self.outcome = work, Outcome()
        self.done: set[int] = set()
        self.dying: set[int] = set()
        self._quiet_s, self._heard_at = quiet_s, time.monotonic()

    def hear(self, number: int, message: Any) -> None:
        match message:
            case Entered():
                self.outcome.entered = message
            case Boundary(step=step):
                self.outcome.states.setdefault(number, {})[step] = message
            case Done():
                self.done.add(number)
            case Dying():
                self.dying.add(number)
            case Raised(error=error, traceback=text):
                self.fail("exception", error, text + self.printed(number))
            case _:
                return
        self._heard_at = time.monotonic()

    def died(self, number: int) -> None:
        if number not in self.dying:
            self.fail("died", f"process {number} has ended by itself", self.printed(number))

    def fail(self, kind: str, text: str, detail: str) -> None:
        if self.outcome.failure is None:
            self.outcome.failure = (kind, text, detail)

    def over(self) -> bool:
        """Whether it has failed."""
        quiet_s = time.monotonic() - self._heard_at
        if quiet_s > self._quiet_s:
            self.fail("hangs", f"nothing has happened for {quiet_s:.0f} s", "")
        return self.outcome.failure is not None

    def printed(self, number: int) -> str:
        """The end of what a process has printed."""
        path = self.work.output(number)
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        return "".join(f"\nprinted: {line}" for line in lines[-OUTPUT_LINES:])


def _one(work: Work, quiet_s: float) -> Outcome:
    listener = _Listener(work, quiet_s)
    with _processes() as processes:
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
        limits = Limits(min_workers=task.workers[0], max_workers=ranks, detection_s=START_TOGETHER_S)
        super().__init__(task, limits, room=ranks)
        self.listener, self._gone = _Listener(work, quiet_s), False

    def heard(self, member: int, message: Any) -> None:
        self.listener.hear(member, message)

    def gone(self, member: int) -> None:
        self.listener.died(member)
        super().gone(member)

    def over(self) -> bool:
        plan = self.plans[-1] if self.plans else None
        if not self._gone and plan is not None and plan.joiners and plan.generation > 1:
            self._gone = True
            for number in self.processes.all:
                self.processes.send(number, Go())
        if self.end is not None and self.end.outcome != "finished":
            self.listener.fail("exception", self.end.reason.strip().splitlines()[-1], "")
        return self.listener.over() or (plan is not None and self.listener.done.issuperset(plan.members))


def _several(work: Work, quiet_s: float) -> Outcome:
    crew = _Several(work, quiet_s)
    try:
        crew.run(crew.over)
    finally:
        crew.close()
    return crew.listener.outcome
