"""A restored generation forms only when every member of it holds the snapshot that its plan names."""

from __future__ import annotations

from typing import Any

from . import Checker


class RestoredTogether(Checker):
    def __init__(self, world: Any) -> None:
        super().__init__(world)
        self.formed: set[int] = set()

    def on_formed(self, rank: Any, generation: int) -> None:
        plan = self.world.plans_on_record[generation]
        if plan.restore is None:
            return
        self.require(rank.loaded == (generation, plan.restore), f"rank {rank.member} goes on from {rank.loaded}")
        if generation not in self.formed:
            self.formed.add(generation)
            missing = [m for m in plan.members if self.world.ranks[m].loaded != (generation, plan.restore)]
            self.require(not missing, f"generation {generation} formed before {missing} had loaded {plan.restore.key}")
