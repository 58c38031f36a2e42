"""What becomes of the slots of one rank: pure bookkeeping, asked before anything is written.

    free --begin--> writing --commit--> committed --a newer snapshot is protected everywhere--> free
                       \\--give up (torn by a write into the state, or the capture failed)----> free

Invariants
    * The newest snapshot that is protected everywhere is never overwritten; nor is any newer one.
    * A snapshot that will never be protected (its keeper went on to a later one, or has given it up) makes room,
      unless it is the newest that was protected everywhere. All others stay: each may be the best there is.
    * If no slot is free, there is no snapshot of this step, on any rank: all agree before they begin.
    * What is being made durable is kept until its keeper says that it is done with it. There is one slot more for
      that, which nothing else takes.
    * When the members change while all slots are taken, nobody learns any more which of what waits is protected
      everywhere. What can't be makes room; where each may be there is one slot more, once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

SLOTS = 3
"""Being written, being protected, protected."""


class Ordinal(NamedTuple):
    """Which state: the later branch is newer, whatever its steps are."""

    branch: int
    step: int

    def packed(self) -> int:
        """As one integer of the same order, for words and lanes of 64 bits."""
        return self.branch << _STEP_BITS | self.step

    @classmethod
    def unpacked(cls, packed: int) -> Ordinal | None:
        """None for -1: there is none yet."""
        return None if packed < 0 else cls(packed >> _STEP_BITS, packed & (1 << _STEP_BITS) - 1)


_STEP_BITS = 44


@dataclass(slots=True)
class Lifecycle:
    slots: list[Ordinal | None] = field(default_factory=lambda: [None] * SLOTS)
    """What each slot holds or is about to; None when it is free."""
    writing: int | None = None
    """The slot that is being written."""
    everywhere: Ordinal | None = None
    """The newest snapshot that is protected everywhere."""
    durable: bool = False
    """Whether snapshots are made durable, so that there is a slot for one of them."""
    kept: Ordinal | None = None
    """The snapshot that is being made durable."""
    widened: bool = False
    """Whether there has been one slot more."""

    def __post_init__(self) -> None:
        if self.durable:
            self.slots.append(None)

    @property
    def free(self) -> list[int]:
        """Slots that hold nothing. One may be written once no other is being written."""
        return [number for number, held in enumerate(self.slots) if held is None]

    @property
    def free_for_any(self) -> list[int]:
        """Those that a snapshot may take that is not to be made durable."""
        free, spare = self.free, int(self.durable and self.kept is None)
        return free if len(free) > spare else []

    def make_way(self, protected_here: Ordinal | None, begun: Ordinal | None) -> list[Ordinal]:
        """The one to give up, if one is, where nobody would learn any more that what waits is protected everywhere.
        If none is, there may be a free slot more instead.

        protected_here: the newest that this node's keeper has protected: what is newer can't be protected everywhere.
        begun: what it is protecting now.
        """
        held = {ordinal for number, ordinal in enumerate(self.slots) if ordinal is not None and number != self.writing}
        others = sorted(held - {self.everywhere, self.kept, protected_here, begun})
        newer = [ordinal for ordinal in others if protected_here is None or ordinal > protected_here]
        if newer:
            return newer[-1:]
        if not self.widened:
            self.widened = True
            self.slots.append(None)
            return []
        return others[:1]  # if all nodes' keepers have come about as far, what is much older is overtaken

    def narrow(self) -> None:
        """There is no memory for the slot that was added last."""
        assert self.widened and self.slots[-1] is None, self
        self.slots.pop()

    def begin(self, number: int, ordinal: Ordinal, *, durable: bool = False) -> None:
        """This snapshot is written into slot `number`, and kept there until `settled`, if it is to be made durable."""
        assert self.writing is None and number in self.free, (number, ordinal, self)
        held = [other for other in self.slots if other is not None]
        assert all(other < ordinal for other in held), f"{ordinal} is not newer than {held}"
        self.writing, self.slots[number] = number, ordinal
        if durable:
            assert self.durable and self.kept is None, self
            self.kept = ordinal

    def commit(self) -> None:
        assert self.writing is not None, self
        self.writing = None

    def give_up(self) -> None:
        assert self.writing is not None, self
        if self.kept == self.slots[self.writing]:
            self.kept = None
        self.slots[self.writing], self.writing = None, None

    def protected(self, everywhere: Ordinal) -> None:
        """All keepers have acknowledged the parity of this snapshot: older ones may go."""
        self.everywhere = everywhere
        self._make_room()

    def settled(self, ordinal: Ordinal) -> None:
        """The keeper is done with making this snapshot durable, and all before it."""
        if self.kept is not None and self.kept <= ordinal:
            self.kept = None
            self._make_room()

    def _make_room(self) -> None:
        for number, held in enumerate(self.slots):
            older = held is not None and self.everywhere is not None and held < self.everywhere
            if older and held != self.kept and number != self.writing:
                self.slots[number] = None

    def never_protected(self, ordinals: Iterable[Ordinal]) -> None:
        """These will never be protected everywhere."""
        for ordinal in ordinals:
            if ordinal not in (self.everywhere, self.kept) and ordinal in self.slots:
                number = self.slots.index(ordinal)
                if number != self.writing:
                    self.slots[number] = None
