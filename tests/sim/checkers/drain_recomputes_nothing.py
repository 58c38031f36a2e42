"""As long as nothing happens but drains, no exchange is aborted, and no micro-batch is computed twice."""

from __future__ import annotations

from typing import Any

from . import Checker


class DrainRecomputesNothing(Checker):
    def __init__(self, world: Any) -> None:
        super().__init__(world)
        self.folded: set[tuple[int, int, int]] = set()

    def on_folded(self, rank: Any, step: int, leaf: int, layers: tuple[int, ...]) -> None:
        mine = {(step, leaf, layer) for layer in layers}
        again = not mine.isdisjoint(self.folded)
        self.folded |= mine
        self.require(
            self.world.disturbed or not again, f"rank {rank.member} computed leaf {leaf} of step {step} once more"
        )

    def on_exchange_failed(self, rank: Any, generation: int, step: int) -> None:
        self.require(self.world.disturbed, f"the exchange of step {step} failed on rank {rank.member}")
