"""In a pipeline of several stages nobody applies a step before every rank has the sums of its stage."""

from __future__ import annotations

from typing import Any

from resilient.core.plan import Plan

from ..truth import Complete
from . import Checker


class ApplyOnlyReduced(Checker):
    def __init__(self, world: Any) -> None:
        super().__init__(world)
        self.reduced: dict[tuple[int, int], set[int]] = {}
        """By step and generation, the members that have their sums."""

    def on_stage_reduced(self, rank: Any, plan: Plan, step: int) -> None:
        self.reduced.setdefault((step, plan.generation), set()).add(rank.member)

    def on_applied(self, rank: Any, result: Complete) -> None:
        by = result.generation
        plan = self.world.plans_on_record[by]
        if len(plan.stages) > 1:
            lacking = set(plan.members) - self.reduced.get((result.step, by), set())
            self.require(not lacking, f"rank {rank.member} applied step {result.step} before {lacking} had their sums")
