"""A rank's snapshots: agreed in the exchange's lane, its share copied while the next step computes."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from resilient.core.lane import DIGEST_BITS, Agreed, Wish
from resilient.core.plan import Plan
from resilient.core.saves import Saves
from snapshot.core.inventory import SnapshotKey
from snapshot.core.lifecycle import Lifecycle, Ordinal

from .memory import SlotFile, ordinal
from .stages import all_stay, captured_by
from .truth import NOBODYS, written

if TYPE_CHECKING:
    from .rank import Rank


class Submission(NamedTuple):
    """What a rank brings into an exchange: the sums of its leaves, and its part of the lane."""

    leaves: frozenset[int]
    values: dict[int, dict[int, int]]
    newest_held: int
    wish: Wish
    lane: list[int]


class Capturing:
    def __init__(self, rank: Rank) -> None:
        self.rank, self.world = rank, rank.world
        saves_every = self.world.setting.saves_every
        self.lifecycle = Lifecycle(durable=saves_every > 0)
        self._saves = Saves(every_steps=saves_every, last_step=self.world.setting.steps) if saves_every else None
        self.everywhere: Ordinal | None = None
        self.verified: Ordinal | None = None
        """The newest state that all ranks were seen to hold, or have begun from."""
        self._digest: tuple[Ordinal, int, Plan] | None = None
        """What was captured last, what it comes to, and by whose plan it was held."""
        self.protected_generation = 0
        """The newest whose members have captured a snapshot that is protected everywhere."""
        self._protected_here: Ordinal | None = None
        """The newest that this node's keeper has protected, as far as is known."""
        self._full_in = 0
        """The generation in which there was no room for the first snapshot."""
        self._captured_in = 0
        """The generation whose members have captured the last one."""
        self._agreed: tuple[int, Plan, Agreed] | None = None
        """The step at whose start all capture the state, the plan by which they share it, and what was agreed."""

    @property
    def copying(self) -> bool:
        """The state must not be written now."""
        return self.lifecycle.writing is not None

    def wish(self, plan: Plan, step: int) -> Wish:
        """About the snapshot of the state after `step`."""
        if not self.world.setting.limits.snapshots:
            return Wish()
        memory = self.world.nodes[self.rank.node].memory
        if memory.settled is not None:
            self.lifecycle.settled(memory.settled)
        if memory.protected[0] == self._captured_in:
            self._protected_here = Ordinal.unpacked(memory.protected[1])
        if self.world.drained and not self.lifecycle.free_for_any and self._captured_in != plan.generation:
            if self._full_in == plan.generation:
                slots = len(self.lifecycle.slots)
                self._discard(self.lifecycle.make_way(self._protected_here, self._begun()))
                self.world.seen["one slot more"] += len(self.lifecycle.slots) - slots
            self._full_in = plan.generation
        due = (step + 1) % self.world.setting.every == 0
        # The first of a new membership is due at once.
        due = due or (self.world.drained and plan.base > 0 and self._captured_in != plan.generation)
        if due and not self.lifecycle.free_for_any:
            self.world.seen["no slot was free"] += 1
        save_due = self._saves is not None and self._saves.is_due(step + 1, self.world.now)
        save_room = self._saves is not None and self.lifecycle.kept is None and bool(self.lifecycle.free)
        if save_due and not save_room:
            self.world.seen["a checkpoint was postponed"] += 1
        generation, protected = memory.protected
        if generation != plan.generation:  # what other members have protected says nothing about these
            protected = -1
        return Wish(
            due=due,
            room=bool(self.lifecycle.free_for_any),
            save_due=save_due,
            save_room=save_room,
            protected=protected,
            digest=self._digest_of(Ordinal(plan.branch, step), plan),
        )

    def _discard(self, given_up: list[Ordinal]) -> None:
        memory, member = self.world.nodes[self.rank.node].memory, self.rank.member
        for each in given_up:
            number = self.lifecycle.slots.index(each)
            self.lifecycle.never_protected((each,))
            if self.lifecycle.slots[number] is None:
                memory.slots.pop((member, number))

    def _begun(self) -> Ordinal | None:
        """What the keeper begins to protect."""
        keeper = self.world.keeper_of(self.rank.node)
        return None if keeper is None or keeper.sending is None else ordinal(keeper.sending)

    def _digest_of(self, ordinal: Ordinal, plan: Plan) -> int | None:
        """None where layers have moved since: not all of a stage have held the same."""
        if self._digest is None or self._digest[0] != ordinal:
            return None
        return self._digest[1] if all_stay(self._digest[2], plan, self.world.setting.layers) else None

    def begin_anew(self, ordinal: Ordinal) -> None:
        """All begin from this state; what was agreed of another line of steps counts no more."""
        self.verified, self._agreed = ordinal, None

    def verified_on(self, branch: int) -> int:
        return self.verified.step if self.verified is not None and self.verified.branch == branch else -1

    def lane_done(self, plan: Plan, step: int, agreed: Agreed) -> None:
        """About the snapshot of the state after `step`."""
        if agreed.verified:
            self.verified = Ordinal(plan.branch, step)
        if agreed.save and self._saves is not None:
            self._saves.saved(step + 1, self.world.now)
        everywhere = Ordinal.unpacked(agreed.protected)
        if everywhere is not None:
            self.everywhere, self.protected_generation = everywhere, plan.generation
            self.lifecycle.protected(everywhere)

    def agree(self, plan: Plan, step: int, agreed: Agreed) -> None:
        self._agreed = step, plan, agreed

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
        self._begin(plan, seat.step, durable=agreed[2].save)

    def _begin(self, plan: Plan, step: int, *, durable: bool) -> None:
        number, member = self.lifecycle.free[0], self.rank.member
        self._captured_in = plan.generation
        self.lifecycle.begin(number, Ordinal(plan.branch, step), durable=durable)
        state = {layer: self.rank.state[layer] for layer in (NOBODYS, *self.rank.layers)}
        self._digest = Ordinal(plan.branch, step), hash(written(state)) & (1 << DIGEST_BITS) - 1, plan
        captured = captured_by(plan, member, self.world.setting.layers)
        memory = self.world.nodes[self.rank.node].memory
        memory.slots[member, number] = slot = SlotFile(
            key=SnapshotKey(attempt=1, branch=plan.branch, step=step, generation=plan.generation),
            member=member,
            rank=plan.rank_of(member),
            world=plan.size,
            state=written({layer: state[layer] for layer in captured}),
            durable=durable,
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
