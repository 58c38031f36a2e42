"""Whoever had to have ended before a keeper answered writes nothing afterwards that an election could count."""

from __future__ import annotations

from typing import Any

from . import Checker


class FencedWriters(Checker):
    def __init__(self, world: Any) -> None:
        super().__init__(world)
        self.fenced: dict[str, set[int]] = {}
        """By node, the ranks of all nodes that its keeper's answers took to have ended."""

    def on_inventory(self, keeper: Any, ended: tuple[int, ...]) -> None:
        self.fenced.setdefault(keeper.node, set()).update(ended)
        alive = [
            member
            for member in ended
            if member in self.world.ranks
            and self.world.ranks[member].node == keeper.node
            and self.world.ranks[member].alive
            and self.world.ranks[member].seat.plan is not None
        ]
        self.require(not alive, f"the keeper of {keeper.node} answered while {alive} could still write")

    def on_captured(self, rank: Any, slot: Any) -> None:
        self.require(rank.alive and not rank.stopped, f"rank {rank.member} captured {slot.key} without running")
        self.require(
            rank.member not in self.fenced.get(rank.node, ()),
            f"rank {rank.member} captured {slot.key} after the keeper of its node had answered without it",
        )
