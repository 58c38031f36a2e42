"""A rank's work in a step of a pipeline: what it has gone forward through, and what it has from other stages.

What is sent is repeated until it has come, so only the sender's death loses it. When a generation has formed, what went
to somebody who does not own the micro-batch any more is sent again.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, NamedTuple

from resilient.core.plan import Plan, Stage
from resilient.core.schedule import Action, Backward, Forward, choose, turns_of, under_way_limit

if TYPE_CHECKING:
    from .rank import Rank

FORWARD, BACKWARD = 0, 1


class Key(NamedTuple):
    since: int
    step: int
    boundary: int
    """The layer above it."""
    leaf: int
    direction: int


class Passing:
    def __init__(self, rank: Rank) -> None:
        self.rank, self.world = rank, rank.world
        self.plan: Plan | None = None
        """Whose generation this rank has seen formed last."""
        self._step = -1
        self._under_way: set[int] = set()
        self._sent: dict[Key, tuple[int, int]] = {}
        """The stage that each thing went to, and the member."""
        self._here: set[Key] = set()

    def drop(self) -> None:
        """The step is given up."""
        self._under_way, self._sent = set(), {}

    def seated(self, plan: Plan) -> None:
        """This plan holds from now on."""
        self.plan = plan
        self._here = {key for key in self._here if key.since >= plan.since}
        for key, (stage, to) in list(self._sent.items()):
            if self._owner(stage, key.leaf) != to:
                self.world.seen["sent again to who owns it now"] += 1
                self._send(key, stage)

    def choose(self, todo: frozenset[int]) -> Action | None:
        """What is ready, of own micro-batches that are not folded yet."""
        plan = self.plan
        assert plan is not None
        if self._step != self.rank.seat.step:
            self.drop()
            self._step = self.rank.seat.step
            self._here = {key for key in self._here if key.step >= self._step}
        self._under_way &= todo
        stage, number = self._stage()
        fresh = todo - self._under_way
        inputs = fresh if number == 0 else self._arrived(fresh, stage.first, FORWARD)
        back = self._arrived(self._under_way, stage.stop, BACKWARD)
        sizes = [each.size for each in plan.stages[number:]]
        return choose(
            under_way_limit("1f1b", sizes, plan.micro_batches),
            fresh=fresh,
            under_way=self._under_way,
            inputs=inputs,
            gradients=back,
            turns=turns_of(plan.micro_batches),
        )

    def _arrived(self, leaves: Collection[int], boundary: int, direction: int) -> set[int]:
        return {leaf for leaf in leaves if self._key(boundary, leaf, direction) in self._here}

    def done(self, action: Action) -> bool:
        """Whether the micro-batch has gone all the way through this stage."""
        assert self.plan is not None
        stage, number = self._stage()
        if isinstance(action, Forward) and number < len(self.plan.stages) - 1:
            self._under_way.add(action.leaf)
            self._send(self._key(stage.stop, action.leaf, FORWARD), number + 1)
            return False
        if isinstance(action, Backward):
            self._under_way.discard(action.leaf)
        if number > 0:
            self._send(self._key(stage.first, action.leaf, BACKWARD), number - 1)
        return True

    def _stage(self) -> tuple[Stage, int]:
        assert self.plan is not None
        rank = self.plan.rank_of(self.rank.member)
        stage = self.plan.stage_of(rank)
        assert stage is not None
        return stage, self.plan.stage_number(rank)

    def _key(self, boundary: int, leaf: int, direction: int) -> Key:
        assert self.plan is not None
        return Key(self.plan.since, self._step, boundary, leaf, direction)

    def _owner(self, stage: int, leaf: int) -> int:
        assert self.plan is not None
        return self.plan.members[self.plan.owners(self.plan.stages[stage].ranks)[leaf]]

    def _send(self, key: Key, stage: int) -> None:
        to = self._owner(stage, key.leaf)
        self._sent[key] = stage, to

        def deliver() -> None:
            other = self.world.ranks[to]
            if not self.rank.alive:
                self.world.seen["died with what it had for another stage"] += 1
            elif other.alive:
                other.run(lambda: other.passing.arrived(key))
            else:
                self.rank.run(lambda: self._unreachable(to))

        self.world.at(self.world.rng.uniform(0.002, 0.05), deliver)

    def arrived(self, key: Key) -> None:
        if self.plan is None or key.since >= self.plan.since:
            self._here.add(key)
            self.rank.advance()

    def _unreachable(self, member: int) -> None:
        """A link of the generation is broken, if it is in it."""
        rank, seat = self.rank, self.rank.seat
        if seat.plan is None or member not in seat.plan.ranks or seat.broken == seat.plan.generation:
            return
        self.world.seen["found out by what it had to send"] += 1
        if seat.forming:
            rank.form_failed(seat.plan.generation)
        else:
            rank.exchange_failed(seat.plan.generation, seat.step)
