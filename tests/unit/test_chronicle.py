"""How many steps are computed again: counted once each, also by a controller that has just come back."""

from __future__ import annotations

from resilient.core.chronicle import Chronicle
from resilient.core.plan import Address, Place, Plan, Restore
from resilient.core.planner import dealt_anew
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
