"""Storage that outlives everything: shards that keepers have written, and which snapshots are whole there."""

from __future__ import annotations

from dataclasses import dataclass, field

from snapshot.core.branches import Lineage
from snapshot.core.inventory import CheckpointFound, SnapshotKey

from .truth import NO_VALUE, Held, State, read


@dataclass(slots=True)
class Storage:
    shards: dict[SnapshotKey, dict[int, Held]] = field(default_factory=dict)
    """By snapshot and rank, the state that was captured."""
    committed_at: dict[SnapshotKey, float] = field(default_factory=dict)
    lineages: dict[SnapshotKey, Lineage] = field(default_factory=dict)

    def write(self, key: SnapshotKey, rank: int, state: Held) -> None:
        self.shards.setdefault(key, {})[rank] = state

    def commit(self, key: SnapshotKey, world: int, now: float, lineage: Lineage) -> bool:
        """False while shards are missing."""
        self.lineages[key] = lineage
        whole = len(self.shards.get(key, {})) == world
        if whole:
            self.committed_at.setdefault(key, now)
        return whole

    def listed(self) -> tuple[CheckpointFound, ...]:
        return tuple(CheckpointFound(key=key, lineage=self.lineages[key], folder=str(key)) for key in self.committed_at)

    def newest(self, before: float, line: Lineage) -> SnapshotKey | None:
        """Of those on this line that were whole by then."""
        known = [key for key, at in self.committed_at.items() if at <= before and line.holds(key.branch, key.step)]
        return max(known, key=lambda key: key.newness, default=None)

    def read(self, folder: str) -> State | None:
        """The state in a checkpoint; None if there is none, or its shards are of different states."""
        for key in self.committed_at:
            if str(key) == folder:
                state = read(self.shards[key].values())
                return None if NO_VALUE in state.values() else state
        return None
