"""What a run's time was spent on, second by second. Pure.

Time is accounted for when a step is committed: only then is it known what the time since the last one was. While nodes
are waited for it is accounted for as it passes. Nothing is ever taken back, so that each state's seconds only grow, and
all together are the time since the beginning, but for what has passed since the last committed step.

    starting     until the first step of this attempt is committed
    productive   steps that nobody had committed before
    blocked      what training waited for snapshots meanwhile
    detecting    from the last sign of life of what was lost to the verdict
    forming      until the new generation was on record, connected and level; of a planned change, what it delayed
    restoring    the same, where the state had to come from a snapshot
    replaying    steps, and micro-batches of dead ranks, that were computed again
    waiting      for nodes
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

State = Literal["starting", "productive", "blocked", "detecting", "forming", "restoring", "replaying", "waiting"]
STATES: tuple[State, ...] = (
    *("starting", "productive", "blocked", "detecting"),
    *("forming", "restoring", "replaying", "waiting"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Interruption:
    """A change of generation between two committed steps. In seconds."""

    detect_s: float
    form_s: float
    """From the verdict, or the decision, until all were level."""
    restored: bool
    planned: bool
    """Training went on meanwhile, for the most part."""


@dataclass(slots=True, kw_only=True)
class Spent:
    seconds: dict[State, float] = field(default_factory=lambda: dict.fromkeys(STATES, 0.0))
    _at: float | None = None
    """The newest time that is known of."""
    _pending_s: float = 0.0
    """Since the last committed step, without what nodes were waited for."""
    _waits: bool = False
    _waited_s: float = 0.0
    """Since the last committed step."""
    _blocked_s: float = 0.0
    """Since then, by snapshots."""
    _blocked_told_s: float = 0.0
    _newest: int = -1
    """The newest step that was ever committed."""

    @property
    def pending_s(self) -> float:
        """What is not accounted for yet."""
        return self._pending_s

    def take_up(self, seconds: Mapping[str, float], newest: int, pending_s: float) -> None:
        """Go on from what an earlier controller has accounted for. pending_s: what has passed since then."""
        self.seconds = {state: float(seconds.get(state, 0.0)) for state in STATES}
        self._newest, self._pending_s = newest, pending_s

    def look(self, now: float, *, waits: bool) -> None:
        """waits: for nodes, from now on. The first look is the beginning."""
        passed_s = 0.0 if self._at is None else max(0.0, now - self._at)
        self._at = now
        if self._waits:
            self.seconds["waiting"] += passed_s
            self._waited_s += passed_s
        else:
            self._pending_s += passed_s
        self._waits = waits

    def blocked(self, total_s: float) -> None:
        """What training has waited for snapshots, as rank 0 tells: of all its time, so less when it is another one."""
        self._blocked_s += total_s - self._blocked_told_s if total_s >= self._blocked_told_s else total_s
        self._blocked_told_s = total_s

    def committed(self, complete: int, now: float, step_s: float, cause: Interruption | None = None) -> None:
        """Steps up to `complete` are. step_s: what one usually takes, 0 if that is not known. cause: why this one came
        late, if it did."""
        self.look(now, waits=False)
        if self._newest < 0 and cause is None:
            self._take("starting", self._pending_s)
        else:
            self._account(complete, step_s, cause)
        self._newest = max(self._newest, complete)
        self._waited_s = self._blocked_s = 0.0

    def _account(self, complete: int, step_s: float, cause: Interruption | None) -> None:
        usual_s = self._pending_s
        if cause is not None:
            usual_s = step_s * max(1, complete - self._newest)
            self._take("detecting", cause.detect_s)
            late_s = self._pending_s - usual_s if cause.planned else cause.form_s - self._waited_s
            self._take("restoring" if cause.restored else "forming", late_s)
        self._take("blocked", self._blocked_s)
        if complete > self._newest:
            self._take("productive", usual_s)
        self._take("replaying", self._pending_s)

    def _take(self, state: State, seconds: float) -> None:
        """As much of what has passed, if there is as much."""
        taken_s = min(max(0.0, seconds), self._pending_s)
        self.seconds[state] += taken_s
        self._pending_s -= taken_s
