"""The end of a pipeline's exchange: each rank comes to have its stage's sums, and then all learn what they come to.

The last part ends for nobody before everybody has the sums of his stage. Whoever has them keeps them, whatever becomes
of the rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from resilient.core.lane import Agreed

from .checkers import Violation
from .truth import Complete

if TYPE_CHECKING:
    from .group import Group


class Closing:
    def __init__(self, group: Group, result: Complete, agreed: int, lane: Agreed) -> None:
        """result: with the sums of all layers."""
        self.group, self.world, self.result = group, group.world, result
        self._agreed, self._lane = agreed, lane
        self._have: set[int] = set()

    def begin(self) -> None:
        for number in self.group.plan.members:
            self.world.at(self.world.rng.uniform(0.001, 0.12), lambda number=number: self._told(number))
        self.world.faults.point("reducing", list(self.group.plan.members))

    def _told(self, number: int) -> None:
        group, step = self.group, self.result.step
        if not group.within(number):
            return
        rank = group.member(number)
        harmed = group.broken or any(not group.member_lives(other) for other in group.plan.members)
        if harmed and (number in group.noticing or self.world.rng.random() < 0.5):
            group.break_exchange(number, step)
            return
        rank.run(lambda: self._done(number))

    def _done(self, number: int) -> None:
        rank = self.group.member(number)
        sums = {layer: self.result.sums[layer] for layer in rank.layers}
        if not rank.stage_done(self.group.plan, self.result.step, sums):
            return
        self._have.add(number)
        if self._have == set(self.group.plan.members):
            self.group.deliver(self.result, self._agreed, self._lane)
        elif any(not self.group.member_lives(other) for other in self.group.plan.members) or self.group.broken:
            self.world.seen["some have their sums, and the step can't end"] += 1
            self.group.break_exchange(number, self.result.step)


def learn_outcome(group: Group, behind: list[int], knowing: list[int], complete: int) -> None:
    """Whoever is behind has its own stage's sums, and lacks only what others know of the step."""
    world = group.world
    world.faults.serving(world.rng.choice(knowing), behind[0])

    def learn() -> None:
        kept = next((kept for number in knowing if (kept := group.member(number).kept) is not None), None)
        if kept is None or kept.step != complete:
            raise Violation("group", f"none of {knowing} has kept the outcome of step {complete}: {kept}")
        for number in behind:
            reduced = group.member(number).reduced
            if reduced is None or reduced[0] != complete:
                raise Violation("group", f"rank {number} has no sums of step {complete} of its own: {reduced}")
            world.seen["behind with its own sums"] += 1
            group.member(number).received_result = group.plan.generation, kept._replace(sums=reduced[1])
        group.level_state(complete)

    group.then(world.rng.uniform(0.01, 0.15), learn)
