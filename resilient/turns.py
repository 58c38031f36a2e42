"""Whose turn it is with a rank's state: the training thread's, or that of a generation's thread.

Rules
    * A generation's thread reads the state from a step's boundary on, or what was held there for it.
    * It changes the state only while its generation is the current one, and never beside another thread that does: one
      that was left behind may still be at it.
    * It puts another state in the place of this rank's only while the training thread is parked.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from snapshot.load import load
from snapshot.table import StateTable

from .core.seat import Seat
from .generation import Superseded

WAKE_S = 1.0
"""How often waits look around although nothing has woken them."""


class Turns:
    """One rank's. Whoever changes what is here, or the seat, holds `changed`."""

    def __init__(self, seat: Seat, objects: Callable[[], Mapping[str, object]], changed: threading.Condition) -> None:
        """objects: all that makes up the state."""
        self._seat, self._objects, self._changed = seat, objects, changed
        self.crossing = False
        """The training thread is at a step's boundary, and reads the state."""
        self.held: tuple[int, StateTable] | None = None
        """A generation, and the state at its first boundary, for joiners."""
        self.loading = threading.Lock()
        """Taken before `changed`, never while that is held."""
        self._parked = False
        """The training thread waits outside of the user's code, and keeps its hands off the state."""

    # By the training thread

    def park(self) -> None:
        """Until there is a step to go on with."""
        with self._changed:
            self._parked = True
            self._changed.notify_all()
            while self._seat.restoring or not (self._seat.settled or self._seat.has_begun_ahead):
                self._changed.wait(WAKE_S)
            self._parked = False

    # By a generation's thread

    def require_current(self, generation: int) -> None:
        with self._changed:
            if (self._seat.plan.generation if self._seat.plan else 0) != generation:
                raise Superseded

    @contextmanager
    def staying(self, generation: int) -> Iterator[None]:
        """Within it this generation is not left behind."""
        with self._changed:
            self.require_current(generation)
            yield

    @contextmanager
    def changing(self, generation: int) -> Iterator[None]:
        """Around changes to what this rank holds: one thread at a time, and none that was left behind."""
        with self.loading:
            self.require_current(generation)
            yield

    def load(self, generation: int, table: StateTable) -> None:
        """Write this state into the user's objects; one at a time, since a thread left behind may still do so."""
        with self.changing(generation):
            load(self._objects(), table)

    def wait_for_boundary(self, generation: int) -> None:
        with self._changed:
            while not self._seat.at_boundary or self.crossing:
                self.require_current(generation)
                self._changed.wait(WAKE_S)
            self.require_current(generation)

    def held_state(self, generation: int) -> StateTable:
        """Of the boundary at which this generation begins."""
        with self._changed:
            while self.held is None or self.held[0] != generation:
                self.require_current(generation)
                self._changed.wait(WAKE_S)
            self.require_current(generation)
            return self.held[1]

    def wait_until_parked(self, generation: int) -> None:
        with self._changed:
            while not self._parked:
                self.require_current(generation)
                self._changed.wait(WAKE_S)
            self.require_current(generation)
