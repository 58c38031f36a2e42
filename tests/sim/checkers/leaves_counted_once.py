"""Every leaf of a committed step is counted exactly once, by the rank that owns it; in a pipeline in every stage."""

from __future__ import annotations

from typing import Any

from ..stages import teams
from . import Checker


class LeavesCountedOnce(Checker):
    def on_reduced(self, group: Any, step: int, contributions: dict[int, frozenset[int]]) -> None:
        for stage, team in enumerate(teams(group.plan)):
            counted = sorted(leaf for member in team for leaf in contributions[member])
            self.require(
                counted == list(range(group.plan.micro_batches)),
                f"step {step} in generation {group.plan.generation} counted {counted} in stage {stage}",
            )
