"""Branches: which snapshots and which data belong to the line of the newest."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapshot.core.branches import Branch, Lineage

ROOT = Branch(number=0)


def lineage(*branches: Branch) -> Lineage:
    return Lineage(branches=(ROOT, *branches))


def held(line: Lineage, branch: int, steps: range) -> list[int]:
    return [step for step in steps if line.holds(branch, step)]


def test_one_branch_holds_all_its_steps() -> None:
    line = lineage()
    assert line.newest == ROOT
    assert held(line, 0, range(5)) == [0, 1, 2, 3, 4]
    assert not line.holds(1, 0)
    assert [line.position_of(step) for step in range(4)] == [0, 1, 2, 3]


def test_an_ancestor_belongs_up_to_where_it_was_left() -> None:
    line = lineage(Branch(number=1, parent=0, at_step=40, skipped=(40, 41)))
    assert held(line, 0, range(38, 45)) == [38, 39, 40]
    assert held(line, 1, range(38, 45)) == [40, 41, 42, 43, 44]
    assert [line.position_of(step) for step in (38, 39, 40, 41)] == [38, 39, 42, 43]


def test_a_branch_that_was_given_up_does_not_belong() -> None:
    line = lineage(
        Branch(number=1, parent=0, at_step=40, skipped=(40,)),
        Branch(number=2, parent=0, at_step=30, skipped=(30,)),
    )
    assert held(line, 0, range(28, 50)) == [28, 29, 30]
    assert held(line, 1, range(28, 50)) == []
    assert line.line == (line.branches[0], line.branches[2])
    assert line.skipped == (30,)


def test_the_least_step_along_the_path_counts() -> None:
    """Branch 2 goes back to before its parent began: to the parent's line, so to branch 0."""
    line = lineage(
        Branch(number=1, parent=0, at_step=40, skipped=(45,)),
        Branch(number=2, parent=1, at_step=30, skipped=(31,)),
        Branch(number=3, parent=2, at_step=35),
    )
    assert held(line, 0, range(28, 50)) == [28, 29, 30]
    assert held(line, 1, range(28, 50)) == []
    assert held(line, 2, range(28, 50)) == [30, 31, 32, 33, 34, 35]
    assert line.skipped == (31, 45)


@settings(deadline=None)
@given(st.lists(st.integers(0, 40), unique=True))
def test_positions_are_those_not_skipped(skipped: list[int]) -> None:
    line = lineage(Branch(number=1, parent=0, at_step=0, skipped=tuple(sorted(skipped))))
    left = [position for position in range(100) if position not in skipped]
    assert [line.position_of(step) for step in range(len(left))] == left


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"number": -1}, "number: got -1, must be at least 0"),
        ({"number": 1, "parent": 0, "at_step": -1}, "branch 1: at_step: got -1, must be at least 0"),
        ({"number": 0, "at_step": 3}, "branch 0: has no parent, so it must start at step 0"),
        ({"number": 1, "parent": 1}, "branch 1: parent: got 1, must be 0..0"),
        ({"number": 1, "parent": 0, "skipped": (4, 3)}, r"branch 1: skipped: got \(4, 3\), must ascend"),
        ({"number": 1, "parent": 0, "skipped": (-1, 3)}, "must ascend from 0 or more"),
        ({"number": 1, "parent": 0, "skipped": (3, 3)}, "must ascend"),
    ],
)
def test_impossible_branches(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Branch(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("branches", "message"),
    [
        ((), r"branches: got numbers \[\], must be at least one, ascending"),
        ((ROOT, ROOT), r"got numbers \[0, 0\], must be at least one, ascending"),
        ((ROOT, Branch(number=1)), r"branches: \[0, 1\] have no parent"),
        ((Branch(number=1, parent=0),), r"branches: \[\] have no parent"),
        ((ROOT, Branch(number=2, parent=1)), r"branch 2: parent: got 1, must be one of \[0, 2\]"),
        (
            (ROOT, Branch(number=1, parent=0, at_step=4, skipped=(3,))),
            "branch 1: skipped: got 3, must be at least 4, the position of step 4",
        ),
        (
            (
                ROOT,
                Branch(number=1, parent=0, at_step=4, skipped=(4, 5)),
                Branch(number=2, parent=1, at_step=5, skipped=(6,)),
            ),
            "branch 2: skipped: got 6, must be at least 7, the position of step 5",
        ),
    ],
)
def test_impossible_lineages(branches: tuple[Branch, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Lineage(branches=branches)
