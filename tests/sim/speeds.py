"""How fast nodes are: some are slow, and some of them only for a while. All randomness is of its own."""

from __future__ import annotations

import random
from dataclasses import replace

from .setting import Setting

MORE_TIME_S = 500.0
"""Slow runs may take so much longer."""


class Speeds:
    def __init__(self, seed: int, *, wanted: bool) -> None:
        self._rng = random.Random(f"speed {seed}")
        self.active = wanted and self._rng.random() < 0.15
        self._evict = self._rng.random() < 0.5
        self._factors: dict[str, tuple[float, float]] = {}
        """By node, how many times as long as usual everything takes, and until when."""

    def changed(self, setting: Setting) -> Setting:
        """Longer, so that speed can be measured."""
        if not self.active:
            return setting
        limits = replace(setting.limits, evict_stragglers=self._evict)
        return replace(setting, limits=limits, steps=setting.steps + self._rng.randint(15, 90))

    @property
    def more_time_s(self) -> float:
        return MORE_TIME_S if self.active else 0.0

    def factor(self, node: str, now: float) -> float:
        if not self.active:
            return 1.0
        factor, until = self._factors.get(node, (0.0, 0.0))
        if now >= until:
            factor = self._rng.choice([1.0, 1.0, 1.0, 2.0, 5.0])
            self._factors[node] = factor, now + self._rng.choice([20.0, 60.0, 1000.0])
        return factor * self._rng.uniform(0.9, 1.1)

    def usual(self, node: str) -> float:
        """Without what varies from one micro-batch to the next: medians hardly show it."""
        return self._factors.get(node, (1.0, 0.0))[0]
