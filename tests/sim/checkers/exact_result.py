"""Every applied result, and every state, is that of the undisturbed run."""

from __future__ import annotations

from typing import Any

from ..truth import leaf_value, next_state, result_of, state_at_start
from . import Checker


class ExactResult(Checker):
    def __init__(self, world: Any) -> None:
        super().__init__(world)
        self.states, self.results = [state_at_start()], []
        for step in range(world.setting.steps):
            values = {leaf: leaf_value(self.states[-1], step, leaf) for leaf in range(world.setting.micro_batches)}
            self.results.append(result_of(values))
            self.states.append(next_state(self.states[-1], step, self.results[-1]))

    def on_applied(self, rank: Any, step: int, result: int) -> None:
        if rank.seat.restoring or self.world.flips.excuses(rank.seat.plan.branch, step):
            return
        self.require(result == self.results[step], f"rank {rank.member} applied a wrong result of step {step}")
        self.require(rank.state == self.states[step + 1], f"rank {rank.member} has a wrong state after step {step}")

    def on_returned(self, rank: Any) -> None:
        if self.world.flips.unseen:
            return
        self.require(rank.state == self.states[-1], f"rank {rank.member} ended with a wrong state")

    def on_ended(self) -> None:
        if self.world.end.outcome == "finished" and not self.world.flips.unseen:
            self.require(self.world.end.digest == str(self.states[-1]), "the run ended with a wrong digest")
