"""What a seed decides before anything happens: the size of the run, what goes wrong how often, and snapshots."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from resilient.core.events import PipelineShape
from resilient.core.limits import Limits

MOST_STEPS = 40
"""Of a pipeline: to look for stages by what layers take is slow."""


@dataclass(slots=True)
class Setting:
    """One world's."""

    micro_batches: int
    steps: int
    limits: Limits
    nodes: list[int]
    fault_phase_s: float
    fault_budget: int
    fault_rate: float
    loss: float
    """Share of messages that never arrive."""
    slowness: float
    """Longest ordinary delay of a message, in seconds."""
    may_lose_state: bool
    parity: int = 0
    every: int = 1
    """Steps from one snapshot to the next."""
    saves_every: int = 0
    """Steps from one checkpoint to the next; 0 for none."""
    layers: int = 1
    pipeline: PipelineShape | None = None
    """Of these layers; where there is none every rank holds all of them."""

    @classmethod
    def drawn(cls, rng: random.Random) -> Setting:
        micro_batches = rng.randint(2, 9)
        most = rng.randint(2, min(6, micro_batches))
        return cls(
            micro_batches=micro_batches,
            steps=rng.randint(3, 8),
            limits=Limits(
                min_workers=rng.randint(1, most), max_workers=most, spares=rng.choice([0, 0, 1]), detection_s=2.0
            ),
            nodes=[rng.randint(1, 3) for _ in range(rng.randint(2, 4))],
            fault_phase_s=rng.uniform(4.0, 14.0),
            fault_budget=rng.choice([0, 1, 1, 2, 3, 4, 6, 9]),
            fault_rate=rng.choice([0.02, 0.05, 0.1, 0.2]),
            loss=rng.choice([0.0, 0.0, 0.1, 0.3]),
            slowness=rng.choice([0.01, 0.05, 0.3]),
            may_lose_state=rng.random() < 0.1,
        )

    def with_pipeline(self, rng: random.Random) -> Setting:
        """A third of the runs train one."""
        if rng.random() >= 1 / 3:
            return self
        layers = rng.randint(2, 4)
        drawn = self if self.limits.snapshots else self.with_snapshots(rng)
        return replace(
            drawn,
            fault_budget=drawn.fault_budget + rng.randint(0, 4),
            steps=min(drawn.steps, MOST_STEPS),
            layers=layers,
            pipeline=PipelineShape(
                stages=rng.randint(1, min(3, layers)),
                layer_bytes=tuple(rng.choice([10, 20, 40]) for _ in range(layers)),
            ),
        )

    def with_snapshots(self, rng: random.Random) -> Setting:
        """Half of the runs have some; the others are what they would be if there were none."""
        if rng.random() < 0.5:
            return self
        saves_every = random.Random(rng.random()).choice([0, 0, 1, 2, 3, 5])
        return replace(
            self,
            limits=replace(self.limits, snapshots=True, checkpoints=saves_every > 0),
            saves_every=saves_every,
            parity=rng.choice([0, 1, 1, 1, 2]),
            every=rng.choice([1, 1, 1, 2, 3]),
            steps=self.steps + rng.randint(2, 10),
            fault_budget=self.fault_budget + rng.randint(0, 4),
        )
