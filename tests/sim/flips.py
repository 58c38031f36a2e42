"""A bit that changes by itself in one rank's state, and what is excused until that has been found.

Everything of the branch on which it happened, from its step on, may be wrong: the ranks go back to before that, and
open another branch, on which all must be right again. A flip after the last comparison is seen by nobody but the end
of the run, which says so. Where nobody else held the same, or all who did have died before they were compared, the
others have what is wrong from whoever is left: nobody can see that, and what another flip makes them go back to may be
wrong too.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, NamedTuple

from snapshot.core.branches import Lineage

from .checkers import Violation

if TYPE_CHECKING:
    from resilient.core.plan import Plan

    from .rank import Rank
    from .world import World

SHARE_OF_SEEDS = 0.3
SHARE_AT_A_MOVE = 0.1
ON_PURPOSE = ("suspect memory or processor", "ended with different states")


def on_purpose(plan: Plan) -> bool:
    """Whether it goes back because ranks were found to differ."""
    return any(text in plan.reason for text in ON_PURPOSE)


class Flip(NamedTuple):
    branch: int
    step: int
    witnesses: frozenset[int]
    """Members that held the same as it should be."""


class Flips:
    def __init__(self, world: World) -> None:
        self.world = world
        self._rng = random.Random(f"flip {world.seed}")
        self._at: dict[int, int] = {}
        """By branch, the step from which on things may be wrong."""
        self._all: list[Flip] = []
        self._wrong_alike: dict[int, int] = {}
        """By branch, the step from which on all ranks may hold the same that is wrong."""
        self._rng_at_moves = random.Random(f"flip as layers move {world.seed}")
        self._is_due_at_a_move = False

    def begin(self) -> None:
        if self.world.setting.limits.snapshots:
            self._is_due_at_a_move = self._rng_at_moves.random() < SHARE_AT_A_MOVE
        if self.world.setting.limits.snapshots and self._rng.random() < SHARE_OF_SEEDS:
            self.world.at(self._rng.uniform(0.5, self.world.setting.fault_phase_s), self._flip)

    def _flip(self) -> None:
        def holds_state(rank: Rank) -> bool:
            return rank.alive and rank.seat.formed > 0 and not rank.seat.restoring and not rank.seat.finished

        able = [rank for _, rank in sorted(self.world.ranks.items()) if holds_state(rank)]
        if not able:
            return
        rank = self._rng.choice(able)
        self.flip_in(rank, self._rng.choice(rank.layers) if len(rank.layers) > 1 else rank.layers[0])

    def layers_move(self, holders: list[Rank]) -> None:
        """From and to these: then, in some seeds, it happens to one of them."""
        if self._is_due_at_a_move and not self.world.healing:
            self._is_due_at_a_move = False
            rank = self._rng_at_moves.choice(holders)
            self.flip_in(rank, self._rng_at_moves.choice(rank.layers))

    def flip_in(self, rank: Rank, layer: int) -> None:
        assert rank.seat.plan is not None
        rank.state[layer] ^= 1
        self.world.disturbed = True
        branch, step = rank.seat.plan.branch, rank.seat.step
        self._at[branch] = min(self._at.get(branch, step), step)
        self._all.append(Flip(branch, step, self._others_with(layer, rank, rank.seat.plan)))
        self.world.seen["a bit flipped"] += 1
        self.world.tell(f"a bit flips in rank {rank.member}, at step {rank.seat.step}")

    def _others_with(self, layer: int, rank: Rank, plan: Plan) -> frozenset[int]:
        others = [self.world.ranks[member] for member in plan.members if member in self.world.ranks]
        return frozenset(
            other.member
            for other in others
            if other is not rank and other.alive and other.seat.has_state and layer in other.layers
        )

    def agreed(self, plan: Plan, step: int) -> None:
        """The members of this generation have compared what each held at the start of this step: it was the same."""
        for flip in self._all:
            left = [member for member in flip.witnesses & plan.ranks.keys() if self.world.ranks[member].alive]
            if flip.branch == plan.branch and flip.step < step and not left:
                self._are_wrong_alike(plan.branch, flip.step + 1)

    def _are_wrong_alike(self, branch: int, step: int) -> None:
        self._wrong_alike[branch] = min(self._wrong_alike.get(branch, step), step)

    def excuses(self, branch: int, step: int) -> bool:
        """Whether what has to do with this step may be wrong."""
        return branch in self._at and step >= self._at[branch]

    def misses(self) -> bool:
        """Whether a rank does not learn that states differ, as somebody has been ended for it already."""
        return self._rng_at_moves.random() < 0.7

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
        """Who goes back begins with what was wrong by then, unless it is because that has been found."""
        if plan.restore is None:
            return
        branch, step = plan.restore.key.branch, plan.restore.key.step
        alike = branch in self._wrong_alike and step >= self._wrong_alike[branch]
        if alike or (self.excuses(branch, step - 1) and not on_purpose(plan)):
            self._at[plan.branch] = min(self._at.get(plan.branch, step), step)
            self._are_wrong_alike(plan.branch, step)

    def line_looked_on(self, plan: Plan) -> Lineage:
        """By whoever decided on this plan: without the branch that it opens because a stage was lost."""
        branches = plan.branches
        opens = self._opens(plan) and not on_purpose(plan)
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
        return self._opens(plan) and on_purpose(plan)
