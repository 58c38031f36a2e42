"""What is counted over a run's whole life, across controllers: time by state, failures, recoveries, steps. Pure.

Sums are exact, and nothing is ever taken back. What only shows how things stand now is not here but in `view`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from .spent import Spent

FailureKind = Literal["rank", "node", "link", "digest", "loss"]
"""digest: ranks that should have held the same held different bits. loss: it was not finite, and was gone back on."""
Phase = Literal["detect", "decide", "form", "redo", "total"]
PHASES: tuple[Phase, ...] = get_args(Phase)
FAILURE_KINDS: tuple[FailureKind, ...] = get_args(FailureKind)
BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 1000.0)


@dataclass(slots=True)
class Durations:
    """A histogram. counts[i] of them took at most BUCKETS_S[i], and more than the bucket before; the last one more than
    all buckets."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS_S) + 1))
    sum_s: float = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(BUCKETS_S, seconds)] += 1
        self.sum_s += seconds


@dataclass(slots=True, kw_only=True)
class Figures:
    spent: Spent = field(default_factory=Spent)
    failures: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FAILURE_KINDS, 0))
    recoveries: dict[str, dict[str, Durations]] = field(default_factory=dict)
    """By kind and phase."""
    steps: int = 0
    """Committed, those that were computed again too."""
    lost_steps: int = 0
    """Had been committed, and were computed again."""
    recomputed: int = 0
    """Micro-batches of the current step that were dealt out again, because those who had them died."""
    newest: int = -1
    """The newest step that was ever committed."""

    def recovered(self, kind: str, phases: Mapping[Phase, float]) -> None:
        found = self.recoveries.setdefault(kind, {phase: Durations() for phase in PHASES})
        for phase in PHASES:
            found[phase].add(phases[phase])

    def count(self, kind: str) -> int:
        """Recoveries of this kind."""
        return sum(self.recoveries[kind]["total"].counts) if kind in self.recoveries else 0

    def as_record(self) -> dict[str, Any]:
        """For the controller that comes after this one."""
        return {
            "seconds": dict(self.spent.seconds),
            "pending_s": self.spent.pending_s,
            "failures": dict(self.failures),
            "recoveries": {
                kind: {phase: [*each.counts, each.sum_s] for phase, each in phases.items()}
                for kind, phases in self.recoveries.items()
            },
            "steps": self.steps,
            "lost_steps": self.lost_steps,
            "recomputed": self.recomputed,
            "newest": self.newest,
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any], gap_s: float) -> Figures:
        """gap_s: what has passed since it was written down."""
        figures = cls(
            failures={kind: int(record["failures"].get(kind, 0)) for kind in FAILURE_KINDS},
            recoveries={
                kind: {phase: Durations(list(map(int, row[:-1])), row[-1]) for phase, row in phases.items()}
                for kind, phases in record["recoveries"].items()
            },
            steps=record["steps"],
            lost_steps=record["lost_steps"],
            recomputed=record["recomputed"],
            newest=record["newest"],
        )
        figures.spent.take_up(record["seconds"], figures.newest, record["pending_s"] + gap_s)
        return figures
