"""Lines of steps. A rollback that skips data opens a new branch, so that no step is ever trained in two ways.

    branch 0   0 --- 40 --- 47          steps 40..47 are given up, and with them their data
    branch 1          `---- 40 --- 60   starts from branch 0's state at the start of step 40

The *line* of a branch is its own steps and, before those, its ancestors' up to where it left them. A step takes the
next data position that no branch of the line has skipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """It starts from the state at the start of `at_step` on its parent's line, and goes on without some data.

    skipped: the positions in the data, in steps' worth, that this branch leaves out, beside what its ancestors do.
    """

    number: int
    parent: int | None = None
    at_step: int = 0
    skipped: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.number < 0:
            raise ValueError(f"number: got {self.number}, must be at least 0")
        if self.at_step < 0:
            raise ValueError(f"branch {self.number}: at_step: got {self.at_step}, must be at least 0")
        if self.parent is None and (self.at_step or self.skipped):
            raise ValueError(f"branch {self.number}: has no parent, so it must start at step 0 and skip nothing")
        if self.parent is not None and not 0 <= self.parent < self.number:
            raise ValueError(f"branch {self.number}: parent: got {self.parent}, must be 0..{self.number - 1}")
        if list(self.skipped) != sorted({position for position in self.skipped if position >= 0}):
            raise ValueError(f"branch {self.number}: skipped: got {self.skipped}, must ascend from 0 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    """All branches of a run, by number, and the line of the newest."""

    branches: tuple[Branch, ...]
    _last_step: dict[int, int | None] = field(init=False, repr=False, compare=False)
    """By branch on the line, newest first: up to which step it belongs to it. None: as far as it goes."""

    def __post_init__(self) -> None:
        numbers = [branch.number for branch in self.branches]
        if not numbers or numbers != sorted(set(numbers)):
            raise ValueError(f"branches: got numbers {numbers}, must be at least one, ascending")
        roots = [branch.number for branch in self.branches if branch.parent is None]
        if roots != numbers[:1]:
            raise ValueError(f"branches: {roots} have no parent, must be the first one, {numbers[0]}, and no other")
        for branch in self.branches[1:]:
            if branch.parent not in numbers:
                raise ValueError(f"branch {branch.number}: parent: got {branch.parent}, must be one of {numbers}")
            self._check_skipped(branch)
        object.__setattr__(self, "_last_step", self._walk(self.newest))

    def _check_skipped(self, branch: Branch) -> None:
        # What the steps before were trained on can no longer be changed.
        before = {skipped for number in self._walk(branch) for skipped in self._by_number[number].skipped}
        first = data_position(branch.at_step, sorted(before - set(branch.skipped)))
        if branch.skipped and branch.skipped[0] < first:
            raise ValueError(
                f"branch {branch.number}: skipped: got {branch.skipped[0]}, "
                f"must be at least {first}, the position of step {branch.at_step}"
            )

    def _walk(self, branch: Branch) -> dict[int, int | None]:
        last: int | None = None
        found = {branch.number: last}
        while branch.parent is not None:
            last = branch.at_step if last is None else min(last, branch.at_step)
            branch = self._by_number[branch.parent]
            found[branch.number] = last
        return found

    @property
    def _by_number(self) -> dict[int, Branch]:
        return {branch.number: branch for branch in self.branches}

    @property
    def newest(self) -> Branch:
        return self.branches[-1]

    @property
    def line(self) -> tuple[Branch, ...]:
        """The newest branch and its ancestors, oldest first."""
        return tuple(branch for branch in self.branches if branch.number in self._last_step)

    def holds(self, branch: int, step: int) -> bool:
        """Whether a snapshot of the state of `branch` at the start of `step` belongs to the newest branch's line."""
        if branch not in self._last_step:
            return False
        last = self._last_step[branch]
        return self._by_number[branch].at_step <= step and (last is None or step <= last)

    @property
    def skipped(self) -> tuple[int, ...]:
        """All positions in the data that the line leaves out, ascending."""
        return tuple(sorted({position for branch in self.line for position in branch.skipped}))

    def position_of(self, step: int) -> int:
        """Which position in the data a step of the newest branch's line trains on."""
        if step < 0:
            raise ValueError(f"step: got {step}, must be at least 0")
        return data_position(step, self.skipped)


def data_position(step: int, skipped: Sequence[int]) -> int:
    """Which position in the data a step trains on, if these are left out (ascending)."""
    position = step
    for left_out in skipped:
        if left_out > position:
            break
        position += 1
    return position
