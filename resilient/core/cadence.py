"""How often to capture: every N steps as the user says, or as often as an overhead budget allows.

"auto" measures: the time that a capture takes from a step is the median step with a capture in flight
minus the median step without, and at least the time that training was seen to wait. The interval is the
smallest for which that, spread over the interval's steps, stays within the budget. Until enough of both
kinds have been seen, every second step is captured.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass, field
from typing import Literal

Every = int | Literal["auto"]

ENOUGH = 8
"""Steps of each kind before "auto" decides."""
REMEMBERED = 32
LONGEST = 1000


@dataclass(slots=True, kw_only=True)
class Cadence:
    every: Every
    budget: float
    """Share of the step time that captures may cost, e.g. 0.02."""
    interval: int = 0
    """Steps from one capture to the next; 0 while it is not known."""
    _with: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    _without: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    _waited: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    _skipped: bool = False

    def __post_init__(self) -> None:
        self.interval = 2 if self.every == "auto" else self.every

    def is_due(self, step: int, last: int | None, agreed: int) -> bool:
        """Whether the state at the start of `step` is to be captured, at the interval all agreed on."""
        if isinstance(self.every, int):
            return step % self.every == 0
        return last is None or step < last or step - last >= agreed

    def measured(self, step_s: float, *, captured: bool, waited_s: float) -> None:
        """One undisturbed step took so long, and of that training waited for a capture."""
        (self._with if captured else self._without).append(step_s)
        if captured:
            self._waited.append(waited_s)

    def skipped(self) -> None:
        """No slot was free: protection does not keep up."""
        self._skipped = True

    def decide(self) -> str | None:
        """Look at what was measured. A sentence if the interval changes, for the log."""
        if self.every != "auto" or len(self._with) < ENOUGH:
            return None
        if self.interval > 1 and len(self._without) < ENOUGH:
            return None
        waited_s = statistics.median(self._waited)
        plain_s = statistics.median(self._without) if self._without else statistics.median(self._with) - waited_s
        cost_s = max(statistics.median(self._with) - plain_s, waited_s, 0.0)
        wanted = min(LONGEST, max(1, math.ceil(cost_s / (self.budget * plain_s))))
        if self._skipped:
            wanted = max(wanted, self.interval + 1)
        self._skipped = False
        if wanted == self.interval or abs(wanted - self.interval) * 4 < self.interval:
            return None
        former, self.interval = self.interval, wanted
        for seen in (self._with, self._without, self._waited):
            seen.clear()
        return (
            f"a snapshot every {wanted} steps (it was {former}): one costs {cost_s * 1000:.1f} ms of a step of "
            f"{plain_s * 1000:.0f} ms, the budget is {self.budget:.1%}"
        )
