"""A bit that changes by itself in one rank's state, and what is excused until that has been found.

Everything of the branch on which it happened, from its step on, may be wrong: the ranks go back to before that, and
open another branch, on which all must be right again. A flip after the last comparison is seen by nobody but the end
of the run, which says so.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from snapshot.core.branches import Lineage

if TYPE_CHECKING:
    from resilient.core.plan import Plan

    from .rank import Rank
    from .world import World

SHARE_OF_SEEDS = 0.3


class Flips:
    def __init__(self, world: World) -> None:
        self.world = world
        self._rng = random.Random(f"flip {world.seed}")
        self._at: tuple[int, int] | None = None
        """Branch and step."""

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
        rank.state ^= 1
        self.world.disturbed = True
        self._at = rank.seat.plan.branch, rank.seat.step
        self.world.seen["a bit flipped"] += 1
        self.world.tell(f"a bit flips in rank {rank.member}, at step {rank.seat.step}")

    def excuses(self, branch: int, step: int) -> bool:
        """Whether what has to do with this step may be wrong."""
        return self._at is not None and branch == self._at[0] and step >= self._at[1]

    @property
    def unseen(self) -> bool:
        """Whether one has not been found so far."""
        return self._at is not None and self.line.newest.number <= self._at[0]

    def excuses_the_end(self, reason: str) -> bool:
        """It was seen too late, or before there was a snapshot to go back to; and the run has said so."""
        said = ("ranks ended with different states", "no state from before that is known to be right")
        return self.unseen and any(text in reason for text in said)

    @property
    def line(self) -> Lineage:
        """Of the newest plan on record."""
        plans = self.world.plans_on_record
        return Lineage(branches=plans[max(plans)].branches)

    def goes_back_on_purpose(self, plan: Plan) -> bool:
        """Whether this plan opens a branch."""
        others = [other for number, other in self.world.plans_on_record.items() if number < plan.generation]
        return bool(others) and plan.branch > max(other.branch for other in others)
