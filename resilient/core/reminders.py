"""Whom to look at when: so that nobody has to look at everybody all the time."""

from __future__ import annotations

from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Generic, TypeVar

Key = TypeVar("Key", int, str)


@dataclass(slots=True)
class Reminders(Generic[Key]):
    _times: dict[Key, float] = field(default_factory=dict)
    """When each is due; one reminder each."""
    _heap: list[tuple[float, Key]] = field(default_factory=list)
    """The same by time, with what has been put forward since."""

    def by(self, at: float, key: Key) -> None:
        """Remind of it at this time, or at an earlier one that was asked for."""
        known = self._times.get(key)
        if known is None or at < known:
            self._times[key] = at
            heappush(self._heap, (at, key))

    def due(self, now: float) -> list[Key]:
        """What is to be looked at now, ascending. That ends the reminder: ask again where it is still of interest."""
        found = []
        while self._heap and self._heap[0][0] <= now:
            at, key = heappop(self._heap)
            if self._times.get(key) == at:
                del self._times[key]
                found.append(key)
        return sorted(found)
