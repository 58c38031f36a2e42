"""Whoever was declared gone changes nothing afterwards: no later decision of that controller includes it."""

from __future__ import annotations

from typing import Any

from resilient.core.plan import Plan

from ..truth import Complete
from . import Checker


class NoZombieEffect(Checker):
    def on_decided(self, shell: Any, plan: Plan) -> None:
        back = shell.condemned & set(plan.members)
        self.require(not back, f"generation {plan.generation} seats {back}, which its controller had declared gone")

    def on_submitted(self, rank: Any) -> None:
        self.require(rank.alive and not rank.stopped, f"rank {rank.member} took part in an exchange without running")

    def on_applied(self, rank: Any, result: Complete) -> None:
        said = f"rank {rank.member} applied step {result.step} without running"
        self.require(rank.alive and not rank.stopped, said)
