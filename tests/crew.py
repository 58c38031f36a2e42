"""A run without Ray, as `resilient.crew` has it, for tests: they see each report, and may lend a hand.

What needs more nodes than one is tested on a cluster.
"""

from __future__ import annotations

import pickle
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from resilient import crew
from resilient.core.events import RankReported
from resilient.core.instructions import End
from resilient.core.limits import Limits
from resilient.core.plan import Plan
from resilient.core.seat import SeatReport
from resilient.cutting import cut_between

from .crew_keeper import CrewKeeper

LIMIT_S = 300.0

Which = Literal["all", "post", "group"]
"""Connections between stages, those of a generation's group, or both."""


@dataclass
class Crew:
    """What became of a run."""

    values: dict[int, Any] = field(default_factory=dict)
    """By member, what its function returned."""
    end: End | None = None
    plans: list[Any] = field(default_factory=list)
    """All generations that were made."""
    said: list[str] = field(default_factory=list)
    bubbles: list[dict[str, Any]] = field(default_factory=list)
    """As in a run's result."""


def run(
    function: Callable[..., Any],
    *args: Any,
    workers: tuple[int, int],
    on_report: Callable[[SeatReport, Hand], None] = lambda report, hand: None,
    room: int | None = None,
    folder: Path | None = None,
) -> Crew:
    """Train with as many ranks as allowed. on_report: sees each report, and may lend a hand. room: for so many ranks at
    once; for all if that is None. folder: for snapshots of every step; there are none if that is None."""
    running = _Running(function, args, workers, on_report, room if room is not None else workers[1], folder)
    try:
        return running.to_the_end()
    finally:
        running.close()


class Hand(Protocol):
    """What a test may do to a run."""

    @property
    def said(self) -> list[str]:
        """What the controller's mind wants the user to read."""

    def kill(self, member: int) -> None: ...

    def ask_to_leave(self, member: int) -> None: ...

    def room(self, ranks: int) -> None: ...

    def cut(self, member: int, other: int, which: Which = "all") -> int:
        """Break the connections between these two. How many those were."""

    @property
    def plan(self) -> Plan | None: ...


class _Running(crew.Crew):
    def __init__(
        self, function: Any, args: Any, workers: tuple[int, int], on_report: Any, most: int, folder: Path | None
    ) -> None:
        task = crew.Task(train=partial(_train, pickle.dumps((function, args))), workers=workers, folder=folder)
        keeper = CrewKeeper(crew.NODE, folder, task.secret) if folder is not None else None
        limits = Limits(min_workers=workers[0], max_workers=workers[1], snapshots=folder is not None)
        super().__init__(task, limits, room=most, keeper=keeper, preload=["tests.crew"])
        self._on_report, self._values = on_report, dict[int, Any]()

    def to_the_end(self) -> Crew:
        deadline = time.monotonic() + LIMIT_S

        def done() -> bool:
            assert time.monotonic() < deadline, f"not done in {LIMIT_S} s: {self.control.current}"
            return self.end is not None and len(self._values) >= self._seated(self.end)

        self.run(done)
        bubbles = self.control.bubbles.as_values()
        return Crew(values=self._values, end=self.end, plans=self.plans, said=self.said, bubbles=bubbles)

    def _seated(self, end: End) -> int:
        """Of a planned generation that comes too late, joiners never finish."""
        plan = self.control.formed or self.control.current
        return plan.size if end.outcome == "finished" and plan is not None else 0

    def heard(self, member: int, message: Any) -> None:
        if isinstance(message, RankReported):
            self._on_report(message.report, self)
        elif isinstance(message, tuple) and message[0] == "value":
            self._values[member] = message[1]

    def cut(self, member: int, other: int, which: Which = "all") -> int:
        assert self.plan is not None
        posts = {place.address.post for place in self.plan.places}
        chosen: dict[Which, Callable[[Any, Any], bool]] = {
            "all": lambda own, peer: True,
            "post": lambda own, peer: own[1] in posts or peer[1] in posts,
            "group": lambda own, peer: own[1] not in posts and peer[1] not in posts,
        }
        processes = self.processes.all
        return cut_between(processes[member].pid, [processes[other].pid], chosen[which])


def _train(job: bytes, member: Any, tell: Any) -> None:
    from resilient.run import Run

    function, args = pickle.loads(job)
    try:
        run = Run(member, seed=0, device=member.device)
        value = function(run, *args)
        run.check_left_in_order()
        tell(("value", value))
        member.telling.returned(run.digest())
    except BaseException:  # noqa: BLE001  the thread's edge
        member.telling.failed(member.step, traceback.format_exc())
