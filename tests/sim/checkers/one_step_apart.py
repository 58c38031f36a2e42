"""Two live seated ranks of the newest formed generation never differ by more than one step."""

from __future__ import annotations

from typing import Any

from ..truth import Complete
from . import Checker


class OneStepApart(Checker):
    def on_applied(self, rank: Any, result: Complete) -> None:
        self.look()

    def on_formed(self, rank: Any, generation: int) -> None:
        self.look()

    def look(self) -> None:
        newest = self.world.newest_formed
        if not newest:
            return
        ranks = [self.world.ranks[member] for member in self.world.plans_on_record[newest].members]
        steps = {rank.member: rank.seat.step for rank in ranks if rank.alive and rank.seat.formed == newest}
        if steps:
            self.require(max(steps.values()) - min(steps.values()) <= 1, f"generation {newest} is at steps {steps}")
