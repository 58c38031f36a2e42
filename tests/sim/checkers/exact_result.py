"""Every applied result, and every state, is that of the undisturbed run."""

from __future__ import annotations

from typing import Any

from ..truth import NOBODYS, Complete, State, digest_of, leaf_values, next_state, outcome_of, state_at_start, sums_of
from . import Checker


class ExactResult(Checker):
    def __init__(self, world: Any) -> None:
        super().__init__(world)
        layers = range(world.setting.layers)
        self.states: list[State] = [state_at_start(len(layers))]
        self.results: list[Complete] = []
        for step in range(world.setting.steps):
            leaves = range(world.setting.micro_batches)
            sums = sums_of({leaf: leaf_values(self.states[-1], step, leaf, layers) for leaf in leaves})
            self.results.append(Complete(step, sums, outcome_of(sums), 0))
            self.states.append(next_state(self.states[-1], self.results[-1]))

    def is_true(self, rank: Any, step: int) -> bool:
        """Whether what it holds is the state at the start of this step."""
        return all(rank.state[layer] == self.states[step][layer] for layer in (NOBODYS, *rank.layers))

    def on_applied(self, rank: Any, result: Complete) -> None:
        step, true = result.step, self.results[result.step]
        if rank.seat.restoring or self.world.flips.excuses(rank.seat.plan.branch, step):
            return
        right = result.outcome == true.outcome and result.sums.items() <= true.sums.items()
        self.require(right, f"rank {rank.member} applied a wrong result of step {step}")
        self.require(self.is_true(rank, step + 1), f"rank {rank.member} has a wrong state after step {step}")

    def on_returned(self, rank: Any) -> None:
        if self.world.flips.unseen:
            return
        self.require(self.is_true(rank, self.world.setting.steps), f"rank {rank.member} ended with a wrong state")

    def on_ended(self) -> None:
        if self.world.end.outcome == "finished" and not self.world.flips.unseen:
            digest = digest_of(self.states[-1], self.world.setting.layers)
            self.require(self.world.end.digest == digest, "the run ended with a wrong digest")
