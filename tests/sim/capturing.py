"""A rank's snapshots: agreed in the exchange's lane, its share copied while the next step computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from resilient.core.plan import Plan
from snapshot.core.inventory import SnapshotKey
from snapshot.core.lifecycle import Lifecycle, Ordinal

from .memory import SlotFile

if TYPE_CHECKING:
    from .rank import Rank


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What a rank brings into the lane; the minimum over all ranks is agreed."""

    ready: bool
    protected: int


class Submission(NamedTuple):
    """What a rank brings into an exchange: the sums of its leaves, and its part of the lane."""

    leaves: frozenset[int]
    values: dict[int, int]
    newest_held: int
    wish: Wish


class Capturing:
    def __init__(self, rank: Rank) -> None:
        self.rank, self.world = rank, rank.world
        self.lifecycle = Lifecycle()
        self.everywhere: Ordinal | None = None
        self._agreed: tuple[int, Plan] | None = None
        """The step at whose start all capture the state, and the plan by which they share it."""

    @property
    def copying(self) -> bool:
        """The state must not be written now."""
        return self.lifecycle.writing is not None

    def wish(self, plan: Plan, step: int) -> Wish:
        """About the snapshot of the state after `step`."""
        if not self.world.setting.limits.snapshots:
            return Wish(ready=False, protected=-1)
        due = (step + 1) % self.world.setting.every == 0
        if due and not self.lifecycle.free:
            self.world.seen["no slot was free"] += 1
        generation, protected = self.world.nodes[self.rank.node].memory.protected
        if generation != plan.generation:  # what other members have protected says nothing about these
            protected = -1
        return Wish(ready=due and bool(self.lifecycle.free), protected=protected)

    def lane_done(self, protected: int) -> None:
        """What all ranks hold protected at least."""
        everywhere = Ordinal.unpacked(protected)
        if everywhere is not None:
            self.everywhere = everywhere
            self.lifecycle.protected(everywhere)

    def agree(self, plan: Plan, step: int) -> None:
        self._agreed = step, plan

    def boundary(self) -> None:
        """The state at the start of the seat's step stands."""
        seat, agreed, self._agreed = self.rank.seat, self._agreed, None
        if agreed is None or seat.plan is None or seat.restoring or agreed[0] != seat.step:
            return
        plan = seat.plan
        if plan.generation != agreed[1].generation:
            if plan.kind == "unplanned":  # somebody has died since, whose share nobody can capture
                self.world.seen["capture given up after a death"] += 1
                return
            plan = agreed[1]
            self.world.seen["capture across a planned change"] += 1
        self._begin(plan, seat.step)

    def _begin(self, plan: Plan, step: int) -> None:
        number, member = self.lifecycle.free[0], self.rank.member
        self.lifecycle.begin(number, Ordinal(plan.branch, step))
        memory = self.world.nodes[self.rank.node].memory
        memory.slots[member, number] = slot = SlotFile(
            key=SnapshotKey(attempt=1, branch=plan.branch, step=step, generation=plan.generation),
            member=member,
            rank=plan.rank_of(member),
            world=plan.size,
            state=self.rank.state,
        )

        def commit() -> None:
            slot.committed = True
            self.lifecycle.commit()
            self.world.seen["share captured"] += 1
            self.world.emit("captured", rank=self.rank, slot=slot)
            keeper = self.world.keeper_of(self.rank.node)
            if keeper is not None:
                keeper.woken(self.everywhere)

        self.rank.later(self.world.rng.uniform(0.02, 0.3), commit)
        self.world.faults.point("capturing", [member])
