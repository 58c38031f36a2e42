"""A lease: whoever holds one ends itself when nobody has renewed it in time."""

from __future__ import annotations

import time


class Lease:
    def __init__(self, duration_s: float) -> None:
        self.duration_s = duration_s
        self._until = time.monotonic() + duration_s
        self._looked_at = time.monotonic()

    def renew(self) -> None:
        self._until = time.monotonic() + self.duration_s

    def expired(self) -> bool:
        """To be asked at least once a second. Time in which this process was stopped does not count."""
        now = time.monotonic()
        gap, self._looked_at = now - self._looked_at, now
        if gap > self.duration_s / 4:
            self._until += gap
        return now > self._until
