"""A bit that changes by itself in one rank's state, and what is excused until that has been found.

Everything of the branch on which it happened, from its step on, may be wrong: the ranks go back to before that, and
open another branch, on which all must be right again. A flip after the last comparison is seen by nobody but the end
of the run, which says so.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from snapshot.core.branches import Lineage

from .checkers import Violation

if TYPE_CHECKING:
    from resilient.core.plan import Plan

    from .rank import Rank
    from .world import World

SHARE_OF_SEEDS = 0.3
ON_PURPOSE = "suspect memory or processor"


class Flips:
    def __init__(self, world: World) -> None:
        self.world = world
        self._rng = random.Random(f"flip {world.seed}")
        self._at: dict[int, int] = {}
        """By branch, the step from which on things may be wrong."""

    def begin(self) -> None:
        if self.world.setting.limits.snapshots and self._rng.random() < SHARE_OF_SEEDS:
            self.world.at(self._rng.uniform(0.5, self.world.setting.fault_phase_s), self._flip)

    def _flip(self) -> None:
        def holds_state(rank: Rank) -> bool:
            return rank.alive and rank.seat.formed > 0 and not rank.seat.restoring and not rank.seat.finished

        able = [rank for _, rank in sorted(self.world.ranks.items()) if holds_state(rank)]
        if not able:
            return
        rank = self._rng.choice(able)
        assert rank.seat.plan is not None
        layer = self._rng.choice(rank.layers) if len(rank.layers) > 1 else rank.layers[0]
        rank.state[layer] ^= 1
        self.world.disturbed = True
        self._at[rank.seat.plan.branch] = rank.seat.step
        self.world.seen["a bit flipped"] += 1
        self.world.tell(f"a bit flips in rank {rank.member}, at step {rank.seat.step}")

    def excuses(self, branch: int, step: int) -> bool:
        """Whether what has to do with this step may be wrong."""
        return branch in self._at and step >= self._at[branch]

    def found(self, plan: Plan, step: int) -> None:
        """Ranks say that their states differ."""
        if not self._at:
            raise Violation("flips", f"states differ in step {step} of {plan}, though no bit has flipped")

    @property
    def unseen(self) -> bool:
        """Whether one has not been found so far."""
        return bool(self._at) and self.line.newest.number <= max(self._at)

    def excuses_the_end(self, reason: str) -> bool:
        """It was seen too late, or before there was a snapshot to go back to; and the run has said so."""
        said = ("ranks ended with different states", "no state from before that is known to be right")
        return self.unseen and any(text in reason for text in said)

    def created(self, plan: Plan) -> None:
        """A branch that is opened because a stage was lost begins with what was wrong by then."""
        newest = plan.branches[-1]
        if newest.parent is None or ON_PURPOSE in plan.reason:
            return
        if self.excuses(newest.parent, newest.at_step - 1):
            self._at.setdefault(newest.number, newest.at_step)

    def line_looked_on(self, plan: Plan) -> Lineage:
        """By whoever decided on this plan: without the branch that it opens because a stage was lost."""
        branches = plan.branches
        opens = self._opens(plan) and ON_PURPOSE not in plan.reason
        return Lineage(branches=branches[:-1] if opens else branches)

    def _opens(self, plan: Plan) -> bool:
        others = [other for number, other in self.world.plans_on_record.items() if number < plan.generation]
        return bool(others) and plan.branch > max(other.branch for other in others)

    @property
    def line(self) -> Lineage:
        """Of the newest plan on record."""
        plans = self.world.plans_on_record
        return Lineage(branches=plans[max(plans)].branches)

    def goes_back_on_purpose(self, plan: Plan) -> bool:
        """Whether this plan opens a branch because states differed."""
        return self._opens(plan) and ON_PURPOSE in plan.reason
