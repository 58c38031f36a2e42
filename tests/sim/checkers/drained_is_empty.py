"""A node is let go only when no rank is on it, and none is ever started there again. Whoever is released holds nothing
that others may need: the generation that has formed last is without it.
"""

from __future__ import annotations

from . import Checker


class DrainedIsEmpty(Checker):
    def on_let_go(self, name: str) -> None:
        there = [member for member, rank in sorted(self.world.ranks.items()) if rank.node == name and rank.alive]
        condemned = self.world.condemned.keys() | self.world.drains.released
        needed = [member for member in there if member not in condemned and self.world.ranks[member].seat.plan]
        self.require(not needed, f"{name} was let go with ranks {needed} on it")
        plan = self.world.plans_on_record[self.world.newest_formed]
        seated = [place.member for place in plan.places if place.node == name]
        self.require(not seated, f"{name} was let go, though ranks {seated} of {plan} are there")

    def on_released(self, member: int) -> None:
        newest = self.world.plans_on_record.get(self.world.newest_formed)
        self.require(
            newest is None or member not in newest.ranks,
            f"rank {member} was released, though it has a seat in {newest}",
        )

    def on_started(self, name: str) -> None:
        self.require(not self.world.nodes[name].let_go, f"a rank was started on {name}, which had been drained")
