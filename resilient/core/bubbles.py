"""The share of a pipeline's steps for which ranks have nothing to do. Pure.

Each rank counts for itself, by the layout that it was in, and tells its sums so far with every report: a report that is
lost costs nothing, and of a rank that dies its last report stays.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

Key = tuple[tuple[int, ...], int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bubble:
    """Of ranks of one stage, over steps that no change of generation has disturbed."""

    ranks: tuple[int, ...]
    """How many each stage of the pipeline has."""
    stage: int
    by_schedule: float | None
    """The share of a step that an even pipeline of so many stages waits; None of an uneven one."""
    rank_steps: int = 0
    """Steps, counted once for each rank."""
    idle: float = 0.0
    """The sum of these steps' shares."""

    @property
    def key(self) -> Key:
        return self.ranks, self.stage


def bubble_of(stages: int, micro_batches: int) -> float:
    """Of an even pipeline (D. Narayanan et al., SC 2021, section 2.2). micro_batches: of each rank."""
    return (stages - 1) / (micro_batches + stages - 1)


@dataclass(slots=True)
class Bubbles:
    """Of one rank; or of all, as they have told."""

    _sums: dict[Key, Bubble] = field(default_factory=dict)
    _told: dict[int, tuple[Bubble, ...]] = field(default_factory=dict)
    """By member, what it has told last."""

    def add(self, more: Bubble) -> None:
        known = self._sums.get(more.key)
        if known is not None:
            more = replace(more, rank_steps=known.rank_steps + more.rank_steps, idle=known.idle + more.idle)
        self._sums[more.key] = more

    def take(self, member: int, told: tuple[Bubble, ...]) -> None:
        """told: all that this member has ever counted."""
        for former in self._told.get(member, ()):
            self.add(replace(former, rank_steps=-former.rank_steps, idle=-former.idle))
        self._told[member] = told
        for each in told:
            self.add(each)

    def forget(self, member: int) -> None:
        """It tells nothing more; what it has counted stays."""
        self._told.pop(member, None)

    def told(self) -> tuple[Bubble, ...]:
        return tuple(self._sums[key] for key in sorted(self._sums))

    def as_values(self) -> list[dict[str, Any]]:
        """As a run's result shows them."""
        return [_as_values(each) for each in self.told() if each.rank_steps]


def _as_values(bubble: Bubble) -> dict[str, Any]:
    return {
        "ranks": list(bubble.ranks),
        "stage": bubble.stage,
        "rank_steps": bubble.rank_steps,
        "idle": bubble.idle / bubble.rank_steps,
        "by_schedule": bubble.by_schedule,
    }


def in_words(bubbles: Iterable[dict[str, Any]]) -> str:
    """Of the layout that most steps were in; empty where there were no stages."""
    by_layout: dict[tuple[int, ...], list[dict[str, Any]]] = {}
    for each in bubbles:
        by_layout.setdefault(tuple(each["ranks"]), []).append(each)
    if not by_layout:
        return ""
    ranks = max(by_layout, key=lambda ranks: sum(each["rank_steps"] for each in by_layout[ranks]))
    found = ", ".join(f"{each['idle']:.0%}" for each in by_layout[ranks])
    expected = by_layout[ranks][0]["by_schedule"]
    more = f"; the schedule alone would leave {expected:.0%}" if expected is not None else ""
    return f"idle in forward and backward, by stage of {len(ranks)}: {found}{more}"
