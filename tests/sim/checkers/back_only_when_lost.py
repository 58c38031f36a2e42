"""The run goes back to a snapshot only if no live rank holds the state; in a pipeline, that of some stage.

A controller does not decide so while a rank that it counts as alive is known to hold it. And when a restored
generation forms, none is left that holds newer state, except ranks that are condemned.
"""

from __future__ import annotations

from typing import Any

from resilient.core.plan import Plan

from ..stages import teams
from . import Checker


class BackOnlyWhenLost(Checker):
    def __init__(self, world: Any) -> None:
        super().__init__(world)
        self.formed: set[int] = set()

    def on_decided(self, shell: Any, plan: Plan) -> None:
        formed = shell.control.formed
        if plan.kind != "restored" or formed is None or shell.control.restoring.rollback is not None:
            return
        current = shell.control.current
        if current is not formed and current.kind == "restored":
            return  # whoever was called to that one has dropped what it held
        holding = [member for member in formed.members if shell.control.membership.is_alive(member)]
        said = f"generation {plan.generation} goes back, though {holding} of {formed} are alive"
        self.require(not self.is_all(formed, holding), said)

    def on_formed(self, rank: Any, generation: int) -> None:
        plan = self.world.plans_on_record[generation]
        if plan.kind != "restored" or generation in self.formed or self.world.flips.goes_back_on_purpose(plan):
            return
        self.formed.add(generation)
        holding = [
            member
            for member, other in sorted(self.world.ranks.items())
            if other.alive
            and member not in self.world.condemned
            and plan.base < other.seat.formed < generation
            and not other.seat.restoring
        ]
        plans = {self.world.ranks[member].seat.formed for member in holding}
        held = [self.world.plans_on_record[number] for number in sorted(plans)]
        kept = any(self.is_all(each, holding) for each in held)
        self.require(not kept, f"generation {generation} went back, though ranks {holding} held the state")

    def is_all(self, plan: Plan, holding: list[int]) -> bool:
        """Whether somebody of every stage is among these."""
        return all(not set(team).isdisjoint(holding) for team in teams(plan))
