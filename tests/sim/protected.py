"""The truth about snapshots: what is protected, and whether it must be readable still."""

from __future__ import annotations

from typing import TYPE_CHECKING

from snapshot.core.branches import Lineage
from snapshot.core.election import Elected, elect
from snapshot.core.inventory import SnapshotKey

from .memory import rings

if TYPE_CHECKING:
    from .world import World

UNREACHED_S = 12.0
"""A node that was silent may have missed a question for that long."""


class Protected:
    def __init__(self, world: World) -> None:
        self.world = world
        self.newest: SnapshotKey | None = None
        """The newest snapshot that all nodes with a share of it had protected while the run still lived."""
        self._settled: dict[SnapshotKey, set[str]] = {}

    def settled(self, key: SnapshotKey, node: str) -> None:
        """This node's keeper has protected its image."""
        nodes = self._settled.setdefault(key, set())
        nodes.add(node)
        everywhere = nodes >= {place.node for place in self.world.plans_on_record[key.generation].places}
        everywhere = everywhere and self.world.state_is_held()  # else it may be too late for the election
        if everywhere and (self.newest is None or key.newness > self.newest.newness):
            self.newest = key
            self.world.seen["snapshot protected everywhere"] += 1
            self.world.faults.protected()

    def is_gone(self, name: str) -> bool:
        """Whether a node is dead, or may count as dead because nothing was heard of it."""
        node = self.world.nodes[name]
        return (
            not node.alive
            or node.let_go
            or (node.silent_until > 0 and self.world.now < node.silent_until + UNREACHED_S)
        )

    def must_be_readable(self, also_gone: str = "", known: set[str] | None = None) -> bool:
        """Whether at most as many nodes are gone of every group as it has parity.

        known: nodes that the controller in question counts with, and has had an answer from.
        """
        if self.newest is None or not self.world.flips.line.holds(self.newest.branch, self.newest.step):
            return False
        for ring in rings(self.world.plans_on_record[self.newest.generation], self.world.setting.parity).values():
            gone = [
                name
                for name in ring.group.nodes
                if name == also_gone
                or self.is_gone(name)
                or self.newest in self.world.nodes[name].damaged
                or (known is not None and name not in known)
            ]
            if len(gone) > ring.group.parity:
                return False
        return True

    def readable(self, known: set[str], line: Lineage) -> Elected | None:
        """What of this line could be restored by whoever saw all that is left."""
        inventories = [self.world.nodes[name].memory.inventory() for name in sorted(known) if not self.is_gone(name)]
        found = elect(inventories, line)
        return found if isinstance(found, Elected) else None
