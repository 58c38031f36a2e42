"""Layers change hands while a planned generation forms: whoever takes one over gets its state from somebody who has it.

All old members are at the step's boundary by then. With what computing needs a rank begins the step, if it has the
memory; the rest comes later. Whoever had a layer keeps it until the generation has formed. If those who had the same
layer hold different bytes of it, nobody goes on, and all go back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from resilient.core.difference import rollback_after_move
from resilient.core.seat import StateReceived

from .checkers import Violation
from .differing import newest_verified, want_back
from .stages import layers_of
from .truth import NOBODYS, state_at_start

if TYPE_CHECKING:
    from .group import Group


class Moving:
    def __init__(self, group: Group, complete: int) -> None:
        self.group, self.world, self.plan, self.complete = group, group.world, group.plan, complete
        self._holders = [number for number in self.plan.members if group.member(number).seat.has_state]

    def begin(self) -> None:
        """Every member's turn, one after the other."""
        receivers = [number for number in self.plan.members if self._lacks(number)]
        if self.plan.kind == "planned":
            self.world.flips.layers_move([self.group.member(number) for number in self._holders])
            for number in self.plan.members:
                if number not in receivers:
                    self._may_begin(number)
        self._next(receivers, receivers)

    def _may_begin(self, number: int) -> None:
        if self.plan.kind == "planned" and self.world.rng.random() < 0.8:
            rank = self.group.member(number)
            rank.later(self.world.rng.uniform(0.001, 0.1), lambda: rank.begin_ahead(self.plan, self.complete))

    def _compare(self) -> None:
        if self.plan.kind == "planned":
            having = {f"layer {layer}": self._holders_of(layer) for layer in self._held()}
            differing = {what: digests for what, digests in having.items() if len(set(digests.values())) > 1}
            if differing:
                self._go_back(differing)
                return
        self.group.level(self.complete)

    def _held(self) -> list[int]:
        return [NOBODYS, *sorted({layer for number in self._holders for layer in self.group.member(number).layers})]

    def _holders_of(self, layer: int) -> dict[int, int]:
        """By rank of the new generation that had this layer, what it has."""
        ranks = {self.plan.rank_of(number): self.group.member(number) for number in self._holders}
        return {number: rank.state[layer] for number, rank in ranks.items() if layer == NOBODYS or layer in rank.layers}

    def _go_back(self, differing: dict[str, dict[int, int]]) -> None:
        step = self.complete + 1
        self.world.flips.found(self.plan, step)
        self.world.seen["layers differed as they were to move"] += 1
        wanted = rollback_after_move(self.plan, step, differing, newest_verified(self.group))
        want_back(self.group, wanted, self.group.fail_later)

    def _lacks(self, number: int) -> list[int]:
        wanted = layers_of(self.plan, number, self.world.setting.layers)
        if number not in self._holders or self.plan.kind == "initial":
            return [NOBODYS, *wanted]
        return [layer for layer in wanted if layer not in self.group.member(number).layers]

    def _next(self, receivers: list[int], everybody: list[int]) -> None:
        """With what computing needs, and all at once where nothing is computed before all have everything."""
        if not receivers:
            self._rest(everybody if self.plan.kind == "planned" else [])
            return
        number, rng = receivers[0], self.world.rng
        self.world.faults.point("moving", [number, *self._holders])

        def give() -> None:
            rank = self.group.member(number)
            if number not in self._holders and not rank.has_empty_hands:
                self.group.then(0.05, give)
                return
            found = {layer: self._value(layer) for layer in self._lacks(number)}
            if number in self._holders:
                if self.plan.kind == "planned":
                    self.world.seen["layers moved"] += 1
                    self.world.faults.moving(list(self.plan.members))
                rank.state = rank.state | found
            elif self.plan.kind != "planned":
                rank.receive_state(self.plan.generation, self.complete, found)
            else:
                self.world.seen["a joiner that had begun joined again"] += rank.begun is not None
                rank.state, rank.partial = found, {}
                rank.passing.drop()
            self._may_begin(number)
            self._next(receivers[1:], everybody)

        self.group.then(rng.uniform(0.01, 0.3), give)

    def _rest(self, receivers: list[int]) -> None:
        """What only updates need."""
        if not receivers:
            self._compare()
            return
        number, rng = receivers[0], self.world.rng
        self.world.faults.point("moving", [number, *self._holders])

        def give() -> None:
            if number not in self._holders:
                rank = self.group.member(number)
                rank.tell_seat(StateReceived(generation=self.plan.generation, complete=self.complete))
            self._rest(receivers[1:])

        self.group.then(rng.uniform(0.01, 0.5), give)

    def _value(self, layer: int) -> int:
        if self.plan.kind == "initial":
            return state_at_start(self.world.setting.layers)[layer]
        ranks = [self.group.member(number) for number in self._holders]
        having = [rank for rank in ranks if layer == NOBODYS or layer in rank.layers]
        if not having:
            raise Violation("group", f"nobody in {self.plan} has layer {layer}")
        return self.world.rng.choice(having).state[layer]
