"""How many steps are computed again: counted once each, also by a controller that has just come back."""

from __future__ import annotations

import json
from dataclasses import replace

from resilient.core.chronicle import Chronicle
from resilient.core.plan import Address, Place, Plan, Restore
from resilient.core.planner import dealt_anew, unplanned
from snapshot.core.inventory import SnapshotKey

PLACE = Place(member=1, node="n", address=Address(host="h", port=1))


def restored(generation: int, step: int) -> Plan:
    return dealt_anew(
        generation=generation,
        base=1,
        kind="restored",
        places=[PLACE],
        joiners=[],
        micro_batches=1,
        reason="test",
        restore=Restore(key=SnapshotKey(attempt=1, branch=0, step=step, generation=1)),
    )


def gone_back(chronicle: Chronicle, generation: int, step: int, *, then: int) -> int:
    """The steps that it counts as computed again, after `then` was the first to be committed."""
    chronicle.created(restored(generation, step), 0.0)
    chronicle.formed(generation, step - 1, 1.0)
    chronicle.committed(generation, then, 2.0)
    return chronicle.recoveries[-1].replayed


def test_a_restarted_controller_learns_from_the_driver_what_was_committed() -> None:
    """All ranks have died with the former one: nobody else can tell."""
    chronicle = Chronicle()
    chronicle.resumed(())
    chronicle.was_committed(19)
    assert gone_back(chronicle, 2, 15, then=15) == 5


def test_what_the_driver_has_heard_of_an_earlier_line_counts_no_more() -> None:
    chronicle = Chronicle()
    chronicle.was_committed(19)
    assert gone_back(chronicle, 2, 15, then=16) == 5
    chronicle.was_committed(19)
    assert gone_back(chronicle, 3, 15, then=16) == 2


def test_steps_are_counted_once_when_the_way_back_is_interrupted() -> None:
    chronicle = Chronicle()
    chronicle.committed(1, 19, 0.0)
    chronicle.created(restored(2, 15), 0.0)
    chronicle.committed(1, 19, 0.5)  # a late word from before
    assert gone_back(chronicle, 3, 14, then=14) == 6


def test_after_a_restart_only_the_newest_line_counts() -> None:
    chronicle = Chronicle()
    chronicle.resumed((restored(4, 10),))
    chronicle.committed(3, 19, 0.0)
    chronicle.committed(4, 11, 0.0)
    assert gone_back(chronicle, 5, 10, then=10) == 2


def lost(chronicle: Chronicle, generation: int, now: float) -> None:
    """A rank, at `now`; the others go on in this generation, and commit the next step."""
    chronicle.lost(1, "n", "killed", 0.25, now, node_lost=False)
    plan = planner_unplanned(generation)
    chronicle.created(plan, now + 0.125, dealt_again=3)
    chronicle.formed(generation, chronicle.figures.newest, now + 0.25)
    chronicle.committed(generation, chronicle.figures.newest + 1, now + 1.0)


def planner_unplanned(generation: int) -> Plan:
    before = dealt_anew(
        generation=generation - 1,
        base=0,
        kind="initial",
        places=[PLACE, replace(PLACE, member=2)],
        joiners=[2],
        micro_batches=2,
        reason="test",
    )
    return unplanned(before, generation, [1], "lost rank 1")


def test_failures_recoveries_and_what_they_cost_are_counted() -> None:
    chronicle = Chronicle()
    for step in range(4):
        chronicle.committed(1, step, float(step))
    lost(chronicle, 2, 3.5)
    figures = chronicle.figures
    assert figures.failures == {"rank": 1, "node": 0, "link": 0, "digest": 0, "loss": 0}
    assert (figures.steps, figures.recomputed, figures.count("rank lost")) == (5, 3, 1)
    assert figures.recoveries["rank lost"]["detect"].sum_s == 0.25
    assert figures.recoveries["rank lost"]["total"].sum_s == 0.25 + 0.125 + 0.125 + 0.75
    assert figures.spent.seconds["detecting"] == 0.25


def test_what_was_counted_outlives_the_controller() -> None:
    former = Chronicle()
    for step in range(4):
        former.committed(1, step, float(step))
    lost(former, 2, 3.5)
    record = json.loads(json.dumps(former.as_record(2)))
    chronicle = Chronicle()
    chronicle.take_up(record, 0.5)
    chronicle.resumed((restored(3, 2),))  # it went back after the last record
    assert chronicle.figures.as_record() == {**former.figures.as_record(), "lost_steps": 3, "pending_s": 0.5}
    chronicle.committed(3, 2, 10.0)
    assert (chronicle.figures.steps, chronicle.figures.newest) == (6, 4)


def test_a_step_that_was_interrupted_does_not_tell_how_long_steps_take() -> None:
    chronicle, plan = Chronicle(), replace(restored(1, 0), base=0, kind="initial", restore=None)
    chronicle.created(plan, 0.0)
    chronicle.formed(1, -1, 0.0)
    for step in range(2):
        chronicle.committed(1, step, step + 1.0)
    chronicle.created(replace(plan, generation=2, base=1, kind="unplanned"), 4.0)
    chronicle.formed(2, 1, 9.0)
    chronicle.committed(2, 2, 10.0)
    assert (chronicle.step_s, chronicle.usual_s) == (8.0, 1.0)
