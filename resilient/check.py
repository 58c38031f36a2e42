"""`resilient check`: the first steps of a training function in every layout that a cluster may bring, on this machine.

One process is the reference. Where another layout has other bits, experiments find out which kind of mistake it is:
the same once more (not deterministic), the micro-batches of each step in the opposite order (something is carried from
one to the next), one process that takes itself for another rank (something is done on one rank alone).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from .check_causes import FAILED, REFUSED, Cause, cause_of
from .check_layout import Difference, Failure, Outcome, first_difference, left_elsewhere, outcome_of
from .check_rank import Layout, Work
from .check_report import CheckReport, Finding, LayoutResult
from .job import Settings

REFERENCE, AGAIN = "one process", "one process again"
LEAST_STEPS = 2
KILL_STEPS, KILL_STEPS_PIPELINE = 3, 4
"""A death, the replacement's arrival, and a step with it; in a pipeline layers move first."""
MOST_RANKS = 5
SETUP_LIMIT_S = 600.0
QUIET_LIMIT_S = 30.0
"""And five times as long as all steps have taken in one process."""

Progress = Callable[[str], None]


class Check:
    def __init__(self, settings: Settings, function: bytes, steps: int, progress: Progress = lambda text: None) -> None:
        if not (isinstance(steps, int) and not isinstance(steps, bool) and steps >= LEAST_STEPS):
            raise ValueError(f"check(steps={steps!r}): is a whole number of steps, {LEAST_STEPS} or more")
        rollback = settings.on_nonfinite == "rollback"  # there are no snapshots here to go back to
        self._settings = replace(settings, on_nonfinite="skip") if rollback else settings
        self._function, self._steps, self._progress = function, steps, progress
        self._limit = steps
        """Where a process is stopped: one step later than a loop should end by itself."""
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
        layout = Layout(name=REFERENCE)
        self._reference = outcome = self._outcome(layout, self._stops)
        made = len(outcome.states.get(1, {}))
        if outcome.failure is None and LEAST_STEPS <= made < self._steps:
            self._steps, self._limit = made, made + 1
            return self._run_reference()  # whose states to resume from are of other steps
        if outcome.failure is None and made < self._steps:
            text = f"the loop has {made} steps, and a check takes {LEAST_STEPS} or more"
            outcome.failure = Failure(kind="exception", text=text)
        if outcome.failure is not None:
            self._failed[layout.name] = (layout, outcome, None)
        self._add(layout, outcome, steps=made, ok=outcome.failure is None)
        self._quiet_s = max(QUIET_LIMIT_S, 5 * outcome.seconds)
        return outcome.failure is None

    @property
    def _stops(self) -> tuple[int, ...]:
        """Steps at whose start a run is resumed."""
        return tuple(sorted({self._steps // 2, self._steps - 1} - {0}))

    def _layouts(self) -> Iterator[tuple[Layout, str]]:
        """Each with the reason why it can't be, or none."""
        entered, steps = self._reference.entered, self._steps
        assert entered is not None
        count, stages = entered.micro_batches, entered.stages
        most = count * stages
        single = "a step has 1 micro-batch" if count == 1 else ""
        yield Layout(name=AGAIN), ""
        pipeline = "a pipeline orders its micro-batches by itself" if stages > 1 else ""
        yield Layout(name="micro-batches in the opposite order", backwards=True), single or pipeline
        sizes = [2, 3]
        if stages == 1 and all(count % size == 0 for size in sizes):
            sizes.append(next((size for size in range(4, MOST_RANKS + 1) if count % size), 0))
        for size in filter(None, sizes):
            uneven = " (uneven)" if stages == 1 and size < count and count % size else ""
            yield Layout(name=f"{size} ranks{uneven}", ranks=size), _too_many(size, most, count)
        killed, least = (2, KILL_STEPS) if stages == 1 else (stages + 1, KILL_STEPS_PIPELINE)
        kill = Layout(name=f"{killed} ranks, one killed and replaced", ranks=killed, dies_in=steps - least)
        too_few = f"it takes {least} steps, and there are {steps}" if steps < least else ""
        yield kill, too_few or _too_many(killed, most, count)
        for step in self._stops:
            yield Layout(name=f"stopped after {step} steps and resumed", resumes_at=step), ""

    def _try(self, layout: Layout, why_not: str) -> None:
        why_not = why_not or self._pointless(layout)
        if why_not:
            self._results.append(LayoutResult(name=layout.name, note=f"not possible: {why_not}"))
            return
        outcome = self._outcome(layout)
        difference = first_difference(self._reference, outcome)
        if outcome.failure is None and (other := left_elsewhere(self._reference, outcome, layout)):
            outcome.failure = Failure(kind="exception", text=other)
        note = _too_late(layout, outcome)
        compared = max(map(len, outcome.states.values()), default=0)
        bad = outcome.failure is not None or difference is not None
        if bad:
            self._failed[layout.name] = (layout, outcome, difference)
        self._add(layout, outcome, steps=compared, ok=not bad, note=note)

    def _pointless(self, layout: Layout) -> str:
        """Why nothing more can be learned from this layout, after what has failed."""
        if AGAIN in self._failed:
            return "one process alone differs from itself"
        hanging = [
            name
            for name, (failed, outcome, _) in self._failed.items()
            if failed.ranks > 1 and outcome.failure is not None and outcome.failure.kind == "hangs"
        ]
        return f"{hanging[0]} hang already" if hanging and layout.ranks > 1 else ""

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
            steps=self._limit,
            folder=self._folder,
            saves_at=saves_at,
        )
        return outcome_of(work, self._quiet_s)

    # Findings

    def _findings(self) -> Iterator[Finding]:
        for layout, outcome, difference in self._failed.values():
            if difference is not None:
                yield _differing(layout, difference, outcome, self._cause(layout))
            elif outcome.failure is not None:
                yield _failing(layout, outcome, outcome.failure, self._cause(layout, outcome.failure))

    def _cause(self, layout: Layout, failure: Failure | None = None) -> Cause:
        if failure is not None and failure.kind in FAILED:
            return FAILED[failure.kind]
        if layout.name == REFERENCE:
            return REFUSED
        return cause_of(layout, {name: each[0] for name, each in self._failed.items()}, self._differs)

    def _differs(self, layout: Layout) -> bool:
        """An experiment, made once at most."""
        if layout.name not in self._outcomes:
            self._outcomes[layout.name] = self._outcome(layout)
        outcome = self._outcomes[layout.name]
        return outcome.failure is not None or first_difference(self._reference, outcome) is not None


def _failing(layout: Layout, outcome: Outcome, failure: Failure, cause: Cause) -> Finding:
    return Finding(
        kind=failure.kind,
        layout=layout.name,
        step=max(outcome.step, layout.resumes_at or 0),
        path="",
        values={"error": failure.text},
        cause=cause.cause,
        remedy=REFUSED.remedy if "LoopError" in failure.text else cause.remedy,
        detail=failure.detail,
    )


def _differing(layout: Layout, found: Difference, outcome: Outcome, cause: Cause) -> Finding:
    later = outcome.failure
    where = f"{layout.name}, rank {found.rank}" if layout.ranks > 1 else layout.name
    return Finding(
        kind="bits",
        layout=layout.name,
        step=found.step,
        path=found.path,
        others=found.others,
        values={REFERENCE: found.expected, where: found.found},
        cause=cause.cause,
        remedy=cause.remedy,
        detail="" if later is None else f"later, in step {outcome.step}: {later.text}",
    )


def _too_many(ranks: int, most: int, micro_batches: int) -> str:
    if ranks <= most:
        return ""
    return f"with {micro_batches} in a step, there are micro-batches for no more than {most}"


def _too_late(layout: Layout, outcome: Outcome) -> str:
    if layout.dies_in is None or outcome.failure is not None:
        return ""
    if not outcome.dying:
        return "none was killed: each has layers that no other has"
    return "" if len(outcome.states) > layout.ranks else "the replacement came too late to train"
