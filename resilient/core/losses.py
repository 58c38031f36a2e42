"""The curve of a run's losses, for whoever looks at it: never more than so many points, however long the run is. Pure.

    every step  --too many points-->  every second step  --too many points-->  every fourth step ...

What remains is what was there at these steps, not means of it: a spike may be left out, but none is invented.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

MOST_POINTS = 2000

Point = tuple[int, float | None]
"""A step and its loss; None for one that is not finite."""


@dataclass(slots=True, kw_only=True)
class Losses:
    most: int = MOST_POINTS
    edition: int = 0
    """Another one when earlier points are not what they were: after thinning out, and when the run has gone back."""
    every: int = 1
    """Only such steps are kept."""
    newest: Point | None = None
    """Whether it is kept or not."""
    _points: dict[int, float | None] = field(default_factory=dict)

    def add(self, step: int, loss: float) -> None:
        """Steps may come in any order, and again."""
        value = loss if math.isfinite(loss) else None
        late = self.newest is not None and step < self.newest[0]
        if not late:
            self.newest = (step, value)
        if step % self.every or step in self._points:
            return
        self.edition += late
        self._points[step] = value
        if len(self._points) >= self.most:
            self.every *= 2
            self.edition += 1
            self._points = {other: kept for other, kept in self._points.items() if other % self.every == 0}

    def take_up(self, every: int, points: Iterable[Point], newest: Point | None) -> None:
        """Go on from what another one had come to."""
        self.every, self.newest, self._points = every, newest, dict(points)
        self.edition += 1

    def back_to(self, step: int) -> None:
        """The run goes on from the start of this step: what it had from there on is not on its line any more."""
        self._points = {other: value for other, value in self._points.items() if other < step}
        self.newest = max(self._points.items(), default=None, key=lambda point: point[0])
        self.edition += 1

    def after(self, step: int) -> list[Point]:
        """The points that are kept after this step, ascending."""
        return sorted((other, value) for other, value in self._points.items() if other > step)
