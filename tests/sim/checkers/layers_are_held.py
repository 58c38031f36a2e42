"""Every rank of the newest formed generation holds the layers of its stage, with the state of its step."""

from __future__ import annotations

from typing import Any

from ..stages import layers_of
from ..truth import Complete
from . import Checker
from .exact_result import ExactResult


class LayersAreHeld(Checker):
    def __init__(self, world: Any) -> None:
        super().__init__(world)
        self.truth = ExactResult(world)

    def on_applied(self, rank: Any, result: Complete) -> None:
        self.look()

    def on_formed(self, rank: Any, generation: int) -> None:
        self.look()

    def look(self) -> None:
        newest = self.world.newest_formed
        plan = self.world.plans_on_record[newest]
        for member in plan.members:
            rank = self.world.ranks[member]
            if not rank.alive or rank.seat.formed != newest or rank.seat.restoring:
                continue
            wanted = layers_of(plan, member, self.world.setting.layers)
            self.require(rank.layers == wanted, f"rank {member} holds layers {rank.layers}, not {wanted} of {newest}")
            if not self.world.flips.excuses(plan.branch, rank.seat.step):
                true = self.truth.is_true(rank, rank.seat.step)
                self.require(true, f"rank {member} holds another state than that of step {rank.seat.step}")
