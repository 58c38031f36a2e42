"""A run that has begun never begins again in silence.

A generation that formed and was lost before any report of it could arrive is no beginning: all that is
lost is a moment's work, and doing it again gives the same bits.
"""

from __future__ import annotations

from typing import Any

from resilient.core.plan import Plan

from . import Checker

UNHEARD_AT_MOST_S = 5.0


class NoFreshStart(Checker):
    def __init__(self, world: Any) -> None:
        super().__init__(world)
        self.began: dict[int, float] = {}
        """Beginnings that have formed, and when."""

    def on_formed(self, rank: Any, generation: int) -> None:
        if self.world.plans_on_record[generation].kind == "initial":
            self.began.setdefault(generation, self.world.now)

    def on_decided(self, shell: Any, plan: Plan) -> None:
        if plan.kind != "initial" or not self.world.seen["step committed"]:
            return
        for generation, began_at in self.began.items():
            members = self.world.plans_on_record[generation].members
            lost_at = min(self.world.now, max(self.world.condemned.get(member, self.world.now) for member in members))
            self.require(
                lost_at - began_at < UNHEARD_AT_MOST_S,
                f"generation {plan.generation} begins anew, though generation {generation} lived for "
                f"{lost_at - began_at:.1f} s",
            )
