"""What a rank tells of the steps that it has committed, and keeps until the driver has it."""

from __future__ import annotations

from collections.abc import Mapping

from .records import RecentLosses, StepValues
from .team import mean


class Accounts:
    """Its caller sees to it that no two threads are here at once."""

    def __init__(self) -> None:
        self.recent = RecentLosses()
        """A part of the state."""
        self._unrecorded: dict[int, StepValues] = {}
        self._losses: list[float] = []

    def committed(self, losses: list[float]) -> None:
        """A step's losses, by micro-batch."""
        self._losses = losses

    def applied(
        self, branch: int, step: int, values: Mapping[int, Mapping[str, float]], snapshots: Mapping[str, float]
    ) -> StepValues:
        """The account of this step; values: what was logged here, by micro-batch."""
        self.recent.add(step, mean(self._losses))
        account = self._unrecorded[step] = StepValues(
            branch=branch,
            step=step,
            losses=tuple(self._losses),
            values={leaf: dict(row) for leaf, row in values.items()},
            snapshots=snapshots,
        )
        return account

    def recorded_through(self, step: int) -> None:
        """The driver has everything up to this step."""
        self._unrecorded = {number: row for number, row in self._unrecorded.items() if number > step}

    def unrecorded(self) -> list[StepValues]:
        return list(self._unrecorded.values())

    def others(self, branch: int) -> list[StepValues]:
        """Of steps that others have committed, as far as the state tells."""
        return [
            StepValues(step=step, branch=branch, losses=(loss,), values={})
            for step, loss in self.recent.means.items()
            if step not in self._unrecorded
        ]
