"""A snapshot that is protected on all its nodes is not lost while no group has lost more nodes than it has parity.

So nobody goes back further than to the newest one.
"""

from __future__ import annotations

from typing import Any

from resilient.core.plan import Plan

from ..memory import ordinal
from . import Checker


class NoProtectedLoss(Checker):
    def on_decided(self, shell: Any, plan: Plan) -> None:
        protected = self.world.protected
        if plan.restore is None or not protected.must_be_readable(known=shell.answering):
            return
        if not self.world.flips.line_looked_on(plan).holds(protected.newest.branch, protected.newest.step):
            return
        self.require(
            ordinal(plan.restore.key) >= ordinal(protected.newest),
            f"generation {plan.generation} goes back to {plan.restore.key}, though {protected.newest} was protected",
        )

    def on_ended(self) -> None:
        protected = self.world.protected
        if self.world.end is None or self.world.end.outcome == "finished":
            return
        line = self.world.ended_by.control.restoring.line_to_look_on()
        if self.world.flips.excuses_the_end(self.world.end.reason) or not (
            protected.newest and line.holds(protected.newest.branch, protected.newest.step)
        ):
            return
        self.require(
            not protected.must_be_readable(known=self.world.ended_by.answering),
            f"the run ended, though {protected.newest} was protected: {self.world.end.reason}",
        )
