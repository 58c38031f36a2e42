"""A run that has begun never begins again in silence.

A generation that formed and vanished before any report of it could arrive is no beginning: all that is
lost is a moment's work, and doing it again gives the same bits.
"""

from __future__ import annotations

from typing import Any

from resilient.core.plan import Plan

from . import Checker

REPORTED_WITHIN_S = 5.0


class NoFreshStart(Checker):
    def __init__(self, world: Any) -> None:
        super().__init__(world)
        self.began_at: float | None = None

    def on_formed(self, rank: Any, generation: int) -> None:
        if self.began_at is None:
            self.began_at = self.world.now

    def on_decided(self, shell: Any, plan: Plan) -> None:
        if plan.kind == "initial" and self.began_at is not None and self.world.seen["step committed"]:
            late_s = self.world.now - self.began_at
            self.require(
                late_s < REPORTED_WITHIN_S,
                f"generation {plan.generation} begins anew, {late_s:.1f} s after the run began",
            )
