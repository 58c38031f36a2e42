"""What ranks tell each other about snapshots in every exchange, and what all of them do about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

NOBODYS = (1 << 63) - 1
"""In the place of a digest, from a rank that has none. Above every digest."""
DIGEST_BITS = 62


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
    digest: int | None = None
    """Of the state at the start of this step, if all capture it; None where it has not been captured."""

    def lane(self) -> list[int]:
        """Numbers of which the minimum over all ranks tells `agreed` all."""
        return [
            *(-int(self.due), int(self.room), -int(self.save_due), int(self.save_room)),
            *(-self.interval, self.protected, -self.protected),
            *((NOBODYS, NOBODYS) if self.digest is None else (self.digest, -self.digest)),
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
    verified: bool = False
    """Whether ranks have compared the state at the start of this step, and all that did hold the same."""
    differs: bool = False
    """Whether they do not. Then nothing else of this counts."""

    @classmethod
    def of(cls, low: Sequence[int]) -> Agreed:
        """low: the minimum of every rank's `Wish.lane()`."""
        due, room, save_due, save_room, interval, oldest, newest, least, most = low
        compared = least != NOBODYS
        save = bool(save_due) and bool(save_room)
        return cls(
            capture=save or (bool(due) and bool(room)),
            save=save,
            interval=-interval,
            protected=oldest if oldest == -newest else -1,
            verified=compared and least == -most,
            differs=compared and least != -most,
        )
