"""Every leaf of a committed step is counted exactly once, by the rank that owns it."""

from __future__ import annotations

from typing import Any

from . import Checker


class LeavesCountedOnce(Checker):
    def on_reduced(self, group: Any, step: int, contributions: dict[int, frozenset[int]]) -> None:
        counted = sorted(leaf for leaves in contributions.values() for leaf in leaves)
        self.require(
            counted == list(range(group.plan.micro_batches)),
            f"step {step} in generation {group.plan.generation} counted {counted}",
        )
