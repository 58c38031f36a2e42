"""What ranks tell of committed steps, and what becomes of it: one row of metrics per step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from .core.plan import Plan


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


Former: TypeAlias = "Callable[[], list[dict[str, float]]]"

REMEMBERED_STEPS = 64
MOST_AT_ONCE = 256
"""Rows that are told again together."""
LATE_STEPS = 2
"""A row is final when so many further steps are committed: what ranks logged comes a little later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What the driver has heard so far: it gives this back with every question."""

    controller: int = 0
    """Process id of the one that has answered last."""
    recoveries: int = 0
    """How many it has told."""
    rewound_in: int = 0
    """The generation of the last rewind."""
    step: int = 0
    """The step that the run was at."""


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


@dataclass(slots=True)
class Records:
    """Rows of metrics, in the order of steps, each handed out once it is final."""

    _losses: dict[int, tuple[float, ...]] = field(default_factory=dict)
    _values: dict[int, dict[int, Mapping[str, float]]] = field(default_factory=dict)
    newest: int = -1
    newest_loss: float | None = None
    """Of the newest step, the mean; None while it is not known."""
    fetched: int = -1
    """The driver has all rows up to this step."""
    rewinds: dict[int, int] = field(default_factory=dict)
    """Steps that the run has gone back to, by the generation that did: rows from there on are to be had anew."""
    branch: int = 0
    former: Former | None = None
    """Reads the rows of the attempts before this one, for a run that had ended with them."""
    _recent: RecentLosses = field(default_factory=RecentLosses)

    def rewind(
        self,
        generation: int,
        step: int,
        branch: int,
        *,
        anew: bool,
        former: Former | None = None,
    ) -> None:
        """The run goes on from the start of this step; if anew, it has no rows before it, but for `former` ones."""
        for later in [other for other in self._losses if other >= step]:
            del self._losses[later], self._values[later]
        self.former = former
        self.fetched = step - 1 if anew else min(self.fetched, step - 1)
        self.newest, self.branch = step - 1, branch
        self._recent.means = {other: mean for other, mean in self._recent.means.items() if other < step}
        self.newest_loss = self._recent.means.get(self.newest)
        self.rewinds[generation] = step

    def resume(self, plans: Sequence[Plan]) -> None:
        """After a restart of the controller: the lines of steps are on record, the rows will be told again."""
        self.rewinds = {plan.generation: plan.restore.key.step for plan in plans if plan.restore is not None}
        self.branch = plans[-1].branch if plans else 0

    @property
    def last_rewind(self) -> int:
        """The generation of the last one; 0 if there was none."""
        return max(self.rewinds, default=0)

    def back_to(self, heard: int) -> int | None:
        """How far rewinds have gone back of which the driver, who has `heard` of those up to this generation, does
        not know."""
        last = self.last_rewind
        self.rewinds = {number: step for number, step in self.rewinds.items() if number > heard or number == last}
        return min((step for generation, step in self.rewinds.items() if generation > heard), default=None)

    @property
    def nothing_was_left(self) -> bool:
        """Whether all steps had been trained already where this attempt began."""
        return self.former is not None and self.newest < self.rewinds[self.last_rewind]

    def add(self, account: StepValues) -> bool:
        """False if it is nothing new, or of another line of steps."""
        if account.step <= self.fetched or account.branch != self.branch:
            return False
        self._losses[account.step] = account.losses
        self._values.setdefault(account.step, {}).update(account.values)
        self._recent.add(account.step, mean_loss(account))
        if account.step >= self.newest:
            self.newest, self.newest_loss = account.step, mean_loss(account)
        return True

    def after(self, fetched: int, *, all_of_them: bool) -> list[dict[str, float]]:
        """Rows after step `fetched`, as far as they are final; without gaps, but for what died with all ranks."""
        if all_of_them and self.former is not None and self.nothing_was_left:
            return [row for row in self.former() if row["step"] > fetched]
        self.fetched = max(self.fetched, fetched)
        for step in [step for step in self._losses if step <= self.fetched]:
            del self._losses[step], self._values[step]
        rows = []
        step = self.fetched + 1
        back_to = self.rewinds.get(self.last_rewind, 0)
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


@dataclass(slots=True, kw_only=True)
class Untold:
    """What a rank has to say of committed steps until the driver has it. Any message may be lost, with the controller
    that it was meant for or on its way: what is not acknowledged in time is told again."""

    recent: RecentLosses = field(default_factory=RecentLosses)
    _rows: dict[int, StepValues] = field(default_factory=dict)
    _acknowledged: int = -1
    _newest: int = -1
    """As the last acknowledgement came."""
    _overdue: int = -1
    """The same, one acknowledgement before."""

    def committed(self, account: StepValues) -> None:
        self._rows[account.step] = account
        self.recent.add(account.step, mean_loss(account))

    def acknowledged(self, through: int) -> None:
        """The driver has all rows up to this step. To be told from time to time, also when that is nothing new."""
        self._acknowledged = through
        self._rows = {step: row for step, row in self._rows.items() if step > through}
        self._overdue, self._newest = self._newest, max(self._rows, default=through)

    def rows(self, branch: int) -> tuple[StepValues, ...]:
        """All that the driver lacks of this branch, the oldest `MOST_AT_ONCE`. Whoever had more to say of a step that
        this rank has not seen may have died; its mean loss is in the state."""
        means = {
            step: StepValues(step=step, branch=branch, losses=(loss,), values={})
            for step, loss in self.recent.means.items()
            if step > self._acknowledged
        }
        found = {**means, **{step: row for step, row in self._rows.items() if row.branch == branch}}
        return tuple(found[step] for step in sorted(found)[:MOST_AT_ONCE])

    def overdue(self, branch: int, *, speaks_for_all: bool) -> tuple[StepValues, ...]:
        """Those of them that should have been acknowledged by now. Of losses one rank speaks for all; what its own
        micro-batches have logged only each rank itself can tell."""
        rows = self.rows(branch) if speaks_for_all else tuple(row for row in self.rows(branch) if row.values)
        return tuple(row for row in rows if row.step <= self._overdue)


def mean_loss(account: StepValues) -> float:
    return sum(account.losses) / len(account.losses)


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
