"""Layers change hands while a planned generation forms: whoever takes one over gets its state from somebody who has it.

All old members are at the step's boundary by then. Whoever had a layer keeps it until the generation has formed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .checkers import Violation
from .stages import layers_of
from .truth import NOBODYS, State, state_at_start

if TYPE_CHECKING:
    from .group import Group


class Moving:
    def __init__(self, group: Group, complete: int) -> None:
        self.group, self.world, self.plan, self.complete = group, group.world, group.plan, complete
        self._holders = [number for number in self.plan.members if group.member(number).seat.has_state]

    def begin(self) -> None:
        """Every member's turn, one after the other."""
        self._next([number for number in self.plan.members if self._lacks(number)])

    def _lacks(self, number: int) -> list[int]:
        wanted = layers_of(self.plan, number, self.world.setting.layers)
        if number not in self._holders or self.plan.kind == "initial":
            return [NOBODYS, *wanted]
        return [layer for layer in wanted if layer not in self.group.member(number).layers]

    def _next(self, receivers: list[int]) -> None:
        if not receivers:
            self.group.level(self.complete)
            return
        number, rng = receivers[0], self.world.rng
        found: State = {}
        self.world.faults.point("moving", [number, *self._holders])

        def give() -> None:
            for layer in self._lacks(number):
                found[layer] = self._value(layer)
            rank = self.group.member(number)
            if number in self._holders:
                if self.plan.kind == "planned":
                    self.world.seen["layers moved"] += 1
                    self.world.faults.moving(list(self.plan.members))
                rank.state = rank.state | found
            else:
                rank.receive_state(self.plan.generation, self.complete, found)
            self._next(receivers[1:])

        self.group.then(rng.uniform(0.01, 0.3), give)

    def _value(self, layer: int) -> int:
        if self.plan.kind == "initial":
            return state_at_start(self.world.setting.layers)[layer]
        ranks = [self.group.member(number) for number in self._holders]
        having = [rank for rank in ranks if layer == NOBODYS or layer in rank.layers]
        if not having:
            raise Violation("group", f"nobody in {self.plan} has layer {layer}")
        return self.world.rng.choice(having).state[layer]
