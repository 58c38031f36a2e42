"""How long a rank takes for a micro-batch, from when it is handed out until its gradient is folded."""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field

REMEMBERED = 16
ENOUGH = 8
WARM_UP = 4
"""The first ones, in which memory is taken and kernels are chosen."""


@dataclass(slots=True)
class Pace:
    """One rank's. Times in seconds, of any clock that does not stand still."""

    _times: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    _handed_at: float | None = None
    _ignored: int = 0

    def handed_out(self, now: float) -> None:
        self._handed_at = now

    def paused(self) -> None:
        """What is under way takes longer than it has to: it does not count."""
        self._handed_at = None

    def folded(self, now: float) -> None:
        if self._handed_at is None:
            return
        took_s, self._handed_at = now - self._handed_at, None
        if self._ignored < WARM_UP:
            self._ignored += 1
        else:
            self._times.append(took_s)

    @property
    def leaf_s(self) -> float:
        """The median of the last ones; 0 while too few are known."""
        return statistics.median(self._times) if len(self._times) >= ENOUGH else 0.0
