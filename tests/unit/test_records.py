"""Rows of metrics: the mean of what micro-batches logged, once nothing more can come."""

from __future__ import annotations

import math
from typing import Any

import torch

from resilient.core.plan import Address, Place, Plan, Restore
from resilient.core.planner import dealt_anew
from resilient.probe import probe
from resilient.records import LATE_STEPS, REMEMBERED_STEPS, RecentLosses, Records, StepValues, Untold, mean_values
from snapshot.core.branches import Branch
from snapshot.core.inventory import SnapshotKey


def account(step: int, losses: tuple[float, ...] = (1.0, 2.0), **values: Any) -> StepValues:
    return StepValues(step=step, losses=losses, values={int(leaf[1:]): row for leaf, row in values.items()})


def test_means_are_over_those_who_logged() -> None:
    values = {1: {"a": 3.0}, 0: {"a": 1.0, "b": 5.0}, 2: {}}
    assert mean_values(values) == {"a": 2.0, "b": 5.0}
    assert mean_values({}) == {}


def test_the_order_of_ranks_changes_no_bit() -> None:
    numbers = {0: {"a": 1e16}, 1: {"a": 1.0}, 2: {"a": -1e16}, 3: {"a": 3.0}}
    expected = mean_values(numbers)
    for order in ([3, 1, 0, 2], [2, 3, 1, 0]):
        assert mean_values({leaf: numbers[leaf] for leaf in order}) == expected


def test_a_row_is_given_out_when_it_is_final() -> None:
    records = Records()
    for step in range(4):
        records.add(account(step, l0={"a": 1.0}))
    rows = records.after(-1, all_of_them=False)
    assert [row["step"] for row in rows] == [float(step) for step in range(4 - LATE_STEPS)]
    records.add(account(0, l1={"a": 5.0}))
    row, *_ = records.after(-1, all_of_them=True)
    assert row == {"step": 0.0, "loss": 1.5, "a": 3.0}


def test_what_was_fetched_is_forgotten_and_not_taken_again() -> None:
    records = Records()
    for step in range(5):
        records.add(account(step))
    assert [row["step"] for row in records.after(2, all_of_them=True)] == [3.0, 4.0]
    records.add(account(1))
    assert records.after(4, all_of_them=True) == []
    assert records.fetched == 4
    assert records.after(1, all_of_them=True) == []


def test_rows_have_no_gaps() -> None:
    records = Records()
    for step in (0, 1, 3, 4, 5, 6):
        records.add(account(step))
    assert [row["step"] for row in records.after(-1, all_of_them=True)] == [0.0, 1.0]
    records.add(account(2))
    assert [row["step"] for row in records.after(-1, all_of_them=False)] == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_a_loss_that_is_not_a_number() -> None:
    records = Records()
    records.add(account(0, losses=(math.nan, 1.0)))
    (row,) = records.after(-1, all_of_them=True)
    assert math.isnan(row["loss"])


def test_the_probe_is_repeatable() -> None:
    threads = torch.get_num_threads()
    digest, fields = probe(threads, torch.device("cpu"))
    assert (digest, fields) == probe(threads, torch.device("cpu"))
    assert f"torch {torch.__version__}, {threads} threads" in fields
    assert probe(threads + 1, torch.device("cpu"))[0] != digest


def test_after_a_rewind_rows_come_anew() -> None:
    records = Records()
    for step in range(6):
        records.add(account(step, losses=(float(step),)))
    assert [row["step"] for row in records.after(-1, all_of_them=False)] == [0.0, 1.0, 2.0, 3.0]
    records.after(3, all_of_them=False)
    records.rewind(7, 2, 0, anew=False)
    for step in range(2, 6):
        records.add(account(step, losses=(float(step),)))
    assert records.rewinds == {7: 2}
    assert [row["step"] for row in records.after(1, all_of_them=True)] == [2.0, 3.0, 4.0, 5.0]


def test_what_died_with_all_ranks_holds_up_nothing() -> None:
    records = Records()
    for step in (0, 1):
        records.add(account(step))
    records.rewind(7, 4, 0, anew=False)  # steps 2 and 3 were committed; one of them is remembered in the snapshot
    assert [row["step"] for row in records.after(-1, all_of_them=False)] == [0.0, 1.0]
    assert records.after(1, all_of_them=False) == [], "step 2 may still be told"
    records.add(account(3))
    for step in range(4, 9):
        records.add(account(step))
    assert [row["step"] for row in records.after(1, all_of_them=True)] == [3.0, 4.0, 5.0, 6.0, 7.0, 8.0]


def test_rows_of_a_branch_that_was_given_up_are_not_taken() -> None:
    records = Records()
    records.rewind(7, 2, 1, anew=True)
    records.add(account(2))
    assert records.after(-1, all_of_them=True) == []


def test_recent_losses_are_few_and_come_back() -> None:
    recent = RecentLosses()
    for step in range(2 * REMEMBERED_STEPS):
        recent.add(step, float(step))
    other = RecentLosses()
    other.load_state_dict(recent.state_dict())
    assert other.means == {float(step): step for step in range(REMEMBERED_STEPS, 2 * REMEMBERED_STEPS)}


def told(rows: tuple[StepValues, ...]) -> list[int]:
    return [row.step for row in rows]


def test_what_is_not_acknowledged_is_told_again() -> None:
    """Told once, to a controller that was just dying, a row was lost: the next one asked nobody for it."""
    untold = Untold()
    for step in range(3):
        untold.committed(account(step))
    untold.acknowledged(-1)
    untold.committed(account(3))
    assert told(untold.overdue(0, speaks_for_all=True)) == [], "it may be on its way"
    untold.acknowledged(0)
    assert told(untold.overdue(0, speaks_for_all=True)) == [1, 2]
    untold.acknowledged(2)
    assert told(untold.overdue(0, speaks_for_all=True)) == [3]
    untold.acknowledged(3)
    assert told(untold.overdue(0, speaks_for_all=True)) == []


def test_only_one_rank_repeats_losses_and_each_what_it_has_logged() -> None:
    untold = Untold()
    untold.committed(account(0))
    untold.committed(account(1, l3={"a": 1.0}))
    untold.acknowledged(-1)
    untold.acknowledged(-1)
    assert told(untold.overdue(0, speaks_for_all=False)) == [1]


def test_a_rank_that_has_not_seen_a_step_tells_its_mean_loss() -> None:
    """All ranks died, and the message by which the next rank 0 told of the steps before was lost."""
    untold = Untold()
    untold.recent.load_state_dict({"means": {4: 1.5, 5: 2.5}})
    untold.committed(account(6))
    untold.acknowledged(4)
    untold.acknowledged(4)
    assert [(row.step, row.losses) for row in untold.overdue(0, speaks_for_all=True)] == [(5, (2.5,)), (6, (1.0, 2.0))]


def test_rows_of_another_branch_are_told_as_means_of_this_one() -> None:
    untold = Untold()
    untold.committed(account(0, l1={"a": 1.0}))
    (row,) = untold.rows(3)
    assert (row.branch, row.losses, row.values) == (3, (1.5,), {})


def test_a_restarted_controller_knows_the_branch_and_how_far_it_went_back() -> None:
    """It took no rows of any branch but the first, and never told the driver of a rewind that the former one made."""
    records = Records()
    records.resume((restored_plan(5, step=4, branch=1),))
    records.add(StepValues(step=4, losses=(1.0,), values={}, branch=1))
    assert records.newest == 4
    assert (records.back_to(0), records.back_to(5)) == (4, None)


def restored_plan(generation: int, step: int, branch: int) -> Plan:
    place = Place(member=1, node="n", address=Address(host="h", port=1))
    return dealt_anew(
        generation=generation,
        base=1,
        kind="restored",
        places=[place],
        joiners=[],
        micro_batches=1,
        reason="test",
        branches=(Branch(number=0), Branch(number=branch, parent=0, at_step=step)),
        restore=Restore(key=SnapshotKey(attempt=1, branch=branch, step=step, generation=1)),
    )


def test_after_a_rewind_the_newest_loss_is_that_of_the_line_that_the_run_is_on() -> None:
    records = Records()
    for step in range(6):
        records.add(account(step, losses=(float(step),)))
        records.after(step - LATE_STEPS, all_of_them=False)
    records.rewind(7, 3, 0, anew=False)
    assert records.newest_loss == 2.0
    records.add(account(3, losses=(30.0,)))
    assert records.newest_loss == 30.0
    records.rewind(8, 0, 0, anew=False)
    assert records.newest_loss is None
