"""What ranks tell of committed steps, and what becomes of it: one row of metrics per step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class StepValues:
    """One rank's account of a committed step."""

    step: int
    losses: tuple[float, ...]
    """Loss of every micro-batch of the step, whoever computed it."""
    values: Mapping[int, Mapping[str, float]]
    """What this rank's micro-batches logged, by micro-batch."""
    branch: int = 0
    snapshots: Mapping[str, float] = field(default_factory=dict)
    """What the rank's snapshots did and cost so far (rank 0's account only)."""


REMEMBERED_STEPS = 64
LATE_STEPS = 2
"""A row is final when so many further steps are committed: what ranks logged comes a little later."""


@dataclass(slots=True)
class Records:
    """Rows of metrics, in the order of steps, each handed out once it is final."""

    _losses: dict[int, tuple[float, ...]] = field(default_factory=dict)
    _values: dict[int, dict[int, Mapping[str, float]]] = field(default_factory=dict)
    newest: int = -1
    fetched: int = -1
    """The driver has all rows up to this step."""
    rewinds: list[int] = field(default_factory=list)
    """Steps that the run has gone back to: rows from there on are to be had anew."""
    branch: int = 0

    def rewind(self, step: int, branch: int, *, anew: bool) -> None:
        """The run goes on from the start of this step; if anew, it has no rows before it."""
        for later in [other for other in self._losses if other >= step]:
            del self._losses[later], self._values[later]
        self.fetched = step - 1 if anew else min(self.fetched, step - 1)
        self.newest, self.branch = step - 1, branch
        self.rewinds.append(step)

    def add(self, account: StepValues) -> None:
        if account.step <= self.fetched or account.branch != self.branch:
            return
        self._losses[account.step] = account.losses
        self._values.setdefault(account.step, {}).update(account.values)
        self.newest = max(self.newest, account.step)

    def after(self, fetched: int, *, all_of_them: bool) -> list[dict[str, float]]:
        """Rows after step `fetched`, as far as they are final; without gaps, but for what died with all ranks."""
        self.fetched = max(self.fetched, fetched)
        for step in [step for step in self._losses if step <= self.fetched]:
            del self._losses[step], self._values[step]
        rows = []
        step = self.fetched + 1
        back_to = self.rewinds[-1] if self.rewinds else 0
        # Whoever goes on tells what it knows of the steps before, first of all.
        told = all_of_them or self.newest >= back_to + LATE_STEPS
        while told and step not in self._losses and step < back_to:
            step += 1  # lost with the ranks that had it; nobody can tell it any more
        while step in self._losses and (all_of_them or step <= self.newest - LATE_STEPS):
            losses = self._losses[step]
            row = {"step": float(step), "loss": sum(losses) / len(losses)}
            rows.append({**row, **mean_values(self._values[step])})
            step += 1
        return rows


@dataclass(slots=True)
class RecentLosses:
    """The mean losses of the last steps, as a part of the state: they outlive even all ranks together."""

    means: dict[int, float] = field(default_factory=dict)

    def add(self, step: int, mean: float) -> None:
        self.means[step] = mean
        self.means.pop(step - REMEMBERED_STEPS, None)

    def state_dict(self) -> dict[str, Any]:
        return {"means": dict(self.means)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.means = dict(state["means"])


def mean_values(values: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    """The mean of each logged name over the micro-batches that logged it, in their order."""
    found: dict[str, list[float]] = {}
    for leaf in sorted(values):
        for name, value in values[leaf].items():
            found.setdefault(name, []).append(value)
    return {name: sum(row) / len(row) for name, row in found.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class ReturnValue:
    """What the user's function returned on one rank, by cloudpickle."""

    member: int
    value: bytes
