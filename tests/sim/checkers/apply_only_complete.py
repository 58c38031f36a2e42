"""A rank applies a step only after an exchange of all members of a generation has completed it."""

from __future__ import annotations

from typing import Any

from ..truth import Complete
from . import Checker


class ApplyOnlyComplete(Checker):
    def __init__(self, world: Any) -> None:
        super().__init__(world)
        self.complete: set[int] = set()

    def on_reduced(self, group: Any, step: int, contributions: dict[int, frozenset[int]]) -> None:
        self.complete.add(step)

    def on_applied(self, rank: Any, result: Complete) -> None:
        said = f"rank {rank.member} applied step {result.step}, which nobody completed"
        self.require(result.step in self.complete, said)
