"""A generation is created once; an unplanned one has only members of a base that had formed."""

from __future__ import annotations

from typing import Any

from resilient.core.plan import Plan

from . import Checker


class GenerationsUnique(Checker):
    def __init__(self, world: Any) -> None:
        super().__init__(world)
        self.plans: dict[int, Plan] = {}
        self.formed: set[int] = set()

    def on_created(self, shell: Any, plan: Plan) -> None:
        self.require(plan.generation not in self.plans, f"generation {plan.generation} was created twice")
        self.require(plan.generation > max(self.plans, default=0), f"generation {plan.generation} is not the newest")
        self.plans[plan.generation] = plan
        if plan.kind == "initial" or (plan.kind == "restored" and plan.base == 0):
            return
        self.require(plan.base in self.formed, f"generation {plan.generation} comes from one that never formed")
        if plan.kind == "unplanned":
            strangers = set(plan.members) - set(self.plans[plan.base].members)
            self.require(not strangers, f"members {strangers} of generation {plan.generation} hold no state")

    def on_formed(self, rank: Any, generation: int) -> None:
        self.formed.add(generation)
        seat = rank.seat
        self.require(
            seat.plan == self.plans[generation], f"rank {rank.member} formed another plan than the one on record"
        )
