"""What a keeper protects next, when it gives up, and which parity it keeps. Pure: no threads, clock or I/O.

Rules
    * Only the newest snapshot that is complete here is protected; those it has overtaken never will be. Newest means
      last in time: a later generation goes first, whatever its steps are, for it may have rolled back.
    * So each keeper sends snapshots in the order of time. Who sends a newer one sends no older one any more, and no
      block that still lacks his part of an older one will ever be complete.
    * What runs is finished first, unless it can't be any more, or has had its turn while a newer one waits.
    * What was given up is taken up again after a while if it is still the newest, for ranks whose slots are all taken
      by what is not protected capture nothing newer; and at once when a peer's address has changed.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from actors.ring import Ring
from snapshot.core.inventory import SnapshotKey
from snapshot.core.lifecycle import Ordinal

TRIES = 5
"""For one snapshot with one peer."""
TURN_S = 10.0
"""So long may a snapshot still take when a newer one waits."""
REST_S = 3.0
"""So long what was given up is left alone."""
MOST_KEPT = 3
"""Parity blocks of one class of one ring: those of as many snapshots."""
MOST_RINGS = 4
"""Of which parity is kept at once; each change of the group's membership makes one."""

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0


def in_time(key: SnapshotKey) -> tuple[int, int, int, int]:
    """The greater, the later it was captured."""
    return (key.attempt, key.generation, key.branch, key.step)


def ordinal(key: SnapshotKey) -> Ordinal:
    return Ordinal(key.branch, key.step)


def pause_s(tries: int) -> float:
    """How long to wait after so many tries have failed."""
    return min(_FIRST_PAUSE_S * 2.0 ** (tries - 1), _LONGEST_PAUSE_S)


class Agenda:
    """One keeper's. Times are seconds of any clock that the caller likes."""

    def __init__(self) -> None:
        self.protected: SnapshotKey | None = None
        self.protected_count = 0
        self.failures: Counter[str] = Counter()
        self._given_up: SnapshotKey | None = None
        self._given_up_at = 0.0
        self._newest: SnapshotKey | None = None
        self._seen_at = 0.0

    def see(self, complete: Collection[SnapshotKey], now: float) -> None:
        """These are complete here now."""
        newest = max(complete, key=in_time, default=None)
        if newest is not None and newest != self._newest:
            self._newest, self._seen_at = newest, now

    def next(self, now: float) -> SnapshotKey | None:
        """What to protect now, if anything."""
        newest = self._newest
        if newest is None or (newest == self._given_up and now - self._given_up_at < REST_S):
            return None
        if self.protected is not None and in_time(newest) <= in_time(self.protected):
            return None
        return newest

    def why_stop(self, running: SnapshotKey, ring: Ring, node: str, latest: Ring | None, now: float) -> str | None:
        """Why what is running should end now, if it should.

        node: whose keeper this is. latest: the ring of the latest generation that is known.
        """
        if latest is not None and latest.generation > ring.generation:
            gone = sorted(set(ring.peers_of(node)) - set(latest.group.nodes))
            if gone:
                return "peer left"
        if self.newer_waits(running) and now - self._seen_at > TURN_S:
            return "overtaken"
        return None

    def newer_waits(self, running: SnapshotKey) -> bool:
        """Whether a newer one than what is running is complete here: then nothing is tried again for it."""
        return self._newest is not None and in_time(self._newest) > in_time(running)

    def succeeded(self, key: SnapshotKey, now: float) -> float:
        """It is protected; the seconds since it was seen, as far as it still is the newest, else 0."""
        self.protected = key
        self.protected_count += 1
        return now - self._seen_at if key == self._newest else 0.0

    def failed(self, key: SnapshotKey, reason: str, now: float) -> None:
        """It is given up, for this reason."""
        self.failures[reason] += 1
        self._given_up, self._given_up_at = key, now

    def revive(self) -> None:
        """A peer has a new address: it may go better now."""
        self._given_up = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockState:
    """A parity block in this keeper's memory. missing: the nodes whose data has not come yet; none: it is complete."""

    key: SnapshotKey
    class_index: int
    missing: frozenset[str]


def overtaken(blocks: Iterable[BlockState], origin: str, key: SnapshotKey) -> list[BlockState]:
    """Those that will never be complete, now that `origin` sends this snapshot."""
    return [block for block in blocks if origin in block.missing and in_time(block.key) < in_time(key)]


def hopeless(latest: Mapping[str, SnapshotKey], origins: Iterable[str], key: SnapshotKey) -> str | None:
    """The node, if there is one, that has sent a newer snapshot already, so that a block of this one can't be begun.

    latest: by node, the newest that it has sent anything of. origins: who would have to send.
    """
    return next((node for node in origins if node in latest and in_time(latest[node]) > in_time(key)), None)


def surplus(blocks: Iterable[BlockState], everywhere: Ordinal | None) -> list[BlockState]:
    """Those that there is no room for, or that nobody needs.

    everywhere: the newest snapshot that is known to be protected on all nodes. Older ones go, it itself stays.
    """
    old = [block for block in blocks if everywhere is not None and ordinal(block.key) < everywhere]
    kept: dict[tuple[int, int], list[BlockState]] = defaultdict(list)
    for block in blocks:
        if block not in old:
            kept[block.key.generation, block.class_index].append(block)
    too_many = [block for of_class in kept.values() for block in _too_many(of_class, everywhere)]
    return old + too_many + _of_old_rings(kept, everywhere)


def _too_many(of_class: list[BlockState], everywhere: Ordinal | None) -> list[BlockState]:
    """What was protected everywhere is worth most, then the newest, then what is complete, then what is newer."""
    newest = max(of_class, key=lambda block: in_time(block.key))

    def worth(block: BlockState) -> tuple[bool, bool, bool, tuple[int, ...]]:
        return ordinal(block.key) == everywhere, block is newest, not block.missing, in_time(block.key)

    return sorted(of_class, key=worth)[: max(0, len(of_class) - MOST_KEPT)]


def _of_old_rings(kept: Mapping[tuple[int, int], list[BlockState]], everywhere: Ordinal | None) -> list[BlockState]:
    latest = sorted({generation for generation, _ in kept})[-MOST_RINGS:]
    return [
        block
        for (generation, _), of_class in kept.items()
        if generation not in latest
        for block in of_class
        if ordinal(block.key) != everywhere
    ]
