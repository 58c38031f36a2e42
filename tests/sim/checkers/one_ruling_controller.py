"""No two controllers create the same generation, and nobody sends a plan that is not on record."""

from __future__ import annotations

from typing import Any

from resilient.core.plan import Plan

from . import Checker


class OneRulingController(Checker):
    def __init__(self, world: Any) -> None:
        super().__init__(world)
        self.creators: dict[int, int] = {}

    def on_created(self, shell: Any, plan: Plan) -> None:
        creator = self.creators.setdefault(plan.generation, shell.number)
        self.require(creator == shell.number, f"two controllers created generation {plan.generation}")

    def on_plan_sent(self, shell: Any, plan: Plan) -> None:
        on_record = self.world.plans_on_record.get(plan.generation)
        self.require(plan == on_record, f"controller {shell.number} sent {plan.generation} otherwise than on record")
