"""What is durable is not lost: nobody goes back further than to the newest checkpoint, and no run ends over it."""

from __future__ import annotations

from typing import Any

from resilient.core.plan import Plan

from ..memory import ordinal
from . import Checker

UNSEEN_AT_MOST_S = 15.0
"""So long a decision may take after storage was listed."""


class NoDurableLoss(Checker):
    def on_decided(self, shell: Any, plan: Plan) -> None:
        line = self.world.flips.line_looked_on(plan)
        newest = self.world.storage.newest(self.world.now - UNSEEN_AT_MOST_S, line)
        if newest is None or plan.kind not in ("initial", "restored"):
            return
        to = plan.restore.key if plan.restore is not None else None
        self.require(
            to is not None and ordinal(to) >= ordinal(newest),
            f"generation {plan.generation} goes back to {to or 'the beginning'}, though {newest} was durable",
        )

    def on_ended(self) -> None:
        end = self.world.end
        if end is None or self.world.flips.excuses_the_end(end.reason):
            return
        line = self.world.ended_by.control.restoring.line_to_look_on()
        newest = self.world.storage.newest(self.world.now - UNSEEN_AT_MOST_S, line)
        if end.outcome != "finished":
            self.require(newest is None, f"the run ended, though {newest} was durable: {end.reason}")
