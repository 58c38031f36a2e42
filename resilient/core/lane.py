"""What ranks tell each other about snapshots in every exchange, and what all of them do about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What a rank brings into the lane."""

    due: bool = False
    """A snapshot is."""
    room: bool = False
    save_due: bool = False
    """One that is to be made durable is."""
    save_room: bool = False
    interval: int = 1
    protected: int = -1
    """Packed ordinal of the newest snapshot its keeper holds protected, -1 for none."""

    def lane(self) -> list[int]:
        """Numbers of which the minimum over all ranks tells `agreed` all."""
        return [
            *(-int(self.due), int(self.room), -int(self.save_due), int(self.save_room)),
            *(-self.interval, self.protected, -self.protected),
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreed:
    """What all ranks do, as the lane says it."""

    capture: bool
    save: bool
    """What is captured is to be made durable."""
    interval: int
    """The longest that any rank wants."""
    protected: int
    """Packed ordinal of the newest protected snapshot, if that is the same on all nodes, else -1."""

    @classmethod
    def of(cls, low: Sequence[int]) -> Agreed:
        """low: the minimum of every rank's `Wish.lane()`."""
        due, room, save_due, save_room, interval, oldest, newest = low
        save = bool(save_due) and bool(save_room)
        return cls(
            capture=save or (bool(due) and bool(room)),
            save=save,
            interval=-interval,
            protected=oldest if oldest == -newest else -1,
        )
