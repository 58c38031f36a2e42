"""What is restored is the true state at the start of its step, and was captured by ranks that held it."""

from __future__ import annotations

from typing import Any

from . import Checker
from .exact_result import ExactResult


class RestoredStateIsTrue(Checker):
    def __init__(self, world: Any) -> None:
        super().__init__(world)
        self.truth = ExactResult(world)

    def on_captured(self, rank: Any, slot: Any) -> None:
        if self.world.flips.excuses(slot.key.branch, slot.key.step):
            return
        true = self.truth.states[slot.key.step]
        self.require(set(slot.state) <= set(true.items()), f"rank {rank.member} captured a wrong state: {slot.key}")

    def on_restored(self, rank: Any, restore: Any) -> None:
        if self.world.flips.unseen and self.world.flips.excuses(restore.key.branch, restore.key.step):
            return  # all have died before anybody could compare
        true = self.truth.states[restore.key.step]
        self.require(rank.state.items() <= true.items(), f"rank {rank.member} loaded a wrong state as {restore.key}")
