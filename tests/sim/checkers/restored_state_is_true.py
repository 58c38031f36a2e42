"""What is restored is the true state at the start of its step, and was captured by ranks that held it."""

from __future__ import annotations

from typing import Any

from . import Checker
from .exact_result import ExactResult


class RestoredStateIsTrue(Checker):
    def __init__(self, world: Any) -> None:
        super().__init__(world)
        self.states = ExactResult(world).states

    def on_captured(self, rank: Any, slot: Any) -> None:
        if self.world.flips.excuses(slot.key.branch, slot.key.step):
            return
        self.require(slot.state == self.states[slot.key.step], f"rank {rank.member} captured a wrong state: {slot.key}")

    def on_restored(self, rank: Any, restore: Any) -> None:
        if self.world.flips.unseen and self.world.flips.excuses(restore.key.branch, restore.key.step):
            return  # all have died before anybody could compare
        self.require(
            rank.state == self.states[restore.key.step], f"rank {rank.member} loaded a wrong state as {restore.key}"
        )
