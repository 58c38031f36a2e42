"""Nodes and ranks that are asked to leave, told as transcripts: facts in, instructions out."""

from __future__ import annotations

from dataclasses import replace

from resilient.core.control import Control
from resilient.core.detector import Detector
from resilient.core.events import (
    GenerationCreated,
    NodeDrained,
    NodeGone,
    NodeLeaving,
    NodeSeen,
    RankGone,
    RankLeaving,
    Resumed,
    SnapshotProtected,
    Tick,
)
from resilient.core.limits import Limits
from resilient.core.view import view
from tests.unit.test_control import Scenario

LIMITS = Limits(min_workers=1, max_workers=2, detection_s=2.0)
SNAPSHOTS = replace(LIMITS, snapshots=True)
B_LEAVES = NodeLeaving(node="b", why="asked to")


def on_two_nodes(limits: Limits = LIMITS) -> Scenario:
    """Rank 1 on node a and rank 2 on node b; generation 1 formed."""
    run = Scenario(limits=limits)
    run.take(NodeSeen(node="a", capacity=1))
    run.take(NodeSeen(node="b", capacity=1))
    run.ready(1, "a")
    run.ready(2, "b")
    run.take(GenerationCreated(generation=1))
    run.report(1, 1)
    run.report(2, 1)
    return run


def rested(run: Scenario, member: int, generation: int = 1) -> list[str]:
    return run.report(member, generation, step=1, complete=0, at_rest=True)


def state(run: Scenario, node: str = "b") -> str:
    return view(run.control, Detector(detection_s=2.0))["leaving"][node]["state"]  # type: ignore[no-any-return]


def test_a_drain_from_its_beginning_to_its_end() -> None:
    run = on_two_nodes()
    assert run.take(B_LEAVES) == ["create 2 planned from 1 of (1,)"]
    assert run.take(B_LEAVES) == [], "a notice is repeated"
    assert run.take(GenerationCreated(generation=2)) == ["send 2 to 1", "send 2 to 2"]
    assert run.report(1, 2) == [], "the one that leaves has not applied its last step"
    assert state(run) == "leaving"
    assert rested(run, 2) == ["release 2", "let go of b"]
    assert run.take(Tick()) == []
    assert state(run) == "leaving"
    assert run.take(NodeDrained(node="b")) == []
    assert state(run) == "drained"
    assert run.take(RankGone(member=2, why="it has ended")) == []
    run.report(1, 2, step=1, complete=0)
    run.report(1, 2, step=2, complete=1)
    (record,) = run.control.chronicle.recoveries
    assert (record.kind, record.lost, record.replayed, record.reason) == ("drained", [], 0, "1 left (node b)")


def test_whoever_has_lost_its_seat_waits_for_nobody_to_take_it() -> None:
    run = on_two_nodes()
    assert run.control.leaving.may_wait_s(run.control.current) == 0.0
    run.take(B_LEAVES)
    assert run.control.leaving.may_wait_s(run.control.current) > 0.0
    run.take(GenerationCreated(generation=2))
    assert [member.number for member in run.control.membership.leavers()] == [2]
    assert run.control.leaving.may_wait_s(run.control.current) == 0.0


def test_whoever_takes_their_place_joins_in_the_same_step() -> None:
    run = on_two_nodes()
    run.take(NodeSeen(node="c", capacity=1))
    assert run.take(B_LEAVES) == ["spawn 3 on c"]
    assert run.ready(3, "c") == ["create 2 planned from 1 of (1, 3)"]
    run.take(GenerationCreated(generation=2))
    run.report(1, 2)
    assert run.control.chronicle.open is not None and run.control.chronicle.open.kind == "drained"


def test_without_time_nobody_is_waited_for() -> None:
    run = on_two_nodes()
    run.take(NodeSeen(node="c", capacity=1))
    soon = NodeLeaving(node="b", why="preempted", left_s=8.0)
    assert run.take(soon) == ["create 2 planned from 1 of (1,)", "spawn 3 on c"]
    run = on_two_nodes()
    run.take(NodeSeen(node="c", capacity=1))
    assert run.take(replace(soon, left_s=20.0)) == ["spawn 3 on c"]
    assert run.take(Tick(), after_s=9.0) == []
    assert run.take(Tick(), after_s=2.0) == ["create 2 planned from 1 of (1,)"]


def test_a_plan_that_leaves_somebody_out_is_sent_to_him_again() -> None:
    run = on_two_nodes()
    run.take(B_LEAVES)
    run.take(GenerationCreated(generation=2))
    run.now += 1.0
    assert run.report(2, 1) == ["send 2 to 2"]
    run.report(1, 2)
    run.now += 1.0
    assert run.report(2, 1) == [], "it has formed"


def test_who_dies_while_he_leaves_is_a_loss_only_until_the_others_have_switched() -> None:
    run = on_two_nodes()
    run.take(B_LEAVES)
    run.take(GenerationCreated(generation=2))
    assert run.take(RankGone(member=2, why="killed")) == ["kill 2", "create 3 unplanned from 1 of (1,)"]
    assert run.control.chronicle.open is not None and run.control.chronicle.open.kind == "rank lost"
    run = on_two_nodes()
    run.take(B_LEAVES)
    run.take(GenerationCreated(generation=2))
    run.report(1, 2, formed=1)
    assert run.take(RankGone(member=2, why="killed")) == ["kill 2"]
    assert run.control.chronicle.open is not None and run.control.chronicle.open.kind == "drained"
    run.report(1, 2)
    assert "let go of b" not in run.take(B_LEAVES), "it has been, when generation 2 had formed"


def test_a_link_that_only_the_leaver_saw_break_counts() -> None:
    run = on_two_nodes()
    run.take(B_LEAVES)
    run.take(GenerationCreated(generation=2))
    run.report(2, 1, broken=1)
    run.now += 1.0
    assert run.take(Tick()) == ["probe 2", "create 3 unplanned from 1 of (1, 2)"]
    assert run.take(GenerationCreated(generation=3)) == ["send 3 to 1", "send 3 to 2"]
    run.report(2, 3)
    assert run.report(1, 3) == []
    assert run.control.creating is not None and run.control.creating.members == (1,), "and then it leaves after all"


def test_a_keeper_is_let_go_when_a_snapshot_without_it_is_protected() -> None:
    run = on_two_nodes(SNAPSHOTS)
    run.take(SnapshotProtected(generation=1))
    run.take(B_LEAVES)
    run.take(GenerationCreated(generation=2))
    run.report(1, 2)
    assert rested(run, 2) == ["release 2"]
    assert run.take(SnapshotProtected(generation=1)) == []
    assert "snapshot" in view(run.control, Detector(detection_s=2.0))["leaving"]["b"]["waits_for"]
    assert run.take(SnapshotProtected(generation=2)) == ["let go of b"]


def test_below_the_minimum_it_stays_and_says_so() -> None:
    run = on_two_nodes(replace(LIMITS, min_workers=2))
    assert run.take(B_LEAVES) == []
    assert view(run.control, Detector(detection_s=2.0))["leaving"]["b"]["stuck"].startswith("not yet: 1 of at least 2")
    assert run.take(Tick(), after_s=700.0) == [], "the run goes on, however long it takes"
    assert run.take(NodeSeen(node="c", capacity=1)) == ["spawn 3 on c"]
    assert run.ready(3, "c") == ["create 2 planned from 1 of (1, 3)"]


def test_where_all_are_to_leave_the_last_one_hands_the_state_over() -> None:
    run = on_two_nodes()
    run.take(NodeLeaving(node="a", why="asked to"))
    assert run.control.creating is not None and run.control.creating.members == (2,)
    run.take(GenerationCreated(generation=2))
    run.report(2, 2)
    assert rested(run, 1) == ["release 1", "let go of a"]
    run.take(B_LEAVES)
    assert run.control.creating is None
    assert run.take(NodeSeen(node="c", capacity=2)) == ["spawn 3 on c", "spawn 4 on c"]
    run.ready(3, "c")
    assert run.ready(4, "c") == ["create 3 planned from 2 of (2, 3, 4)"]
    run.take(GenerationCreated(generation=3))
    assert run.report(3, 3) == ["create 4 planned from 3 of (3, 4)"]


def test_a_rank_leaves_and_its_node_gets_another() -> None:
    run = Scenario(limits=LIMITS).begun()
    assert run.take(RankLeaving(member=2, why="SIGTERM", left_s=30.0)) == ["spawn 3 on a"]
    assert run.take(RankLeaving(member=2, why="SIGTERM", left_s=29.0)) == []
    assert run.ready(3) == ["create 2 planned from 1 of (1, 3)"]
    run.take(GenerationCreated(generation=2))
    run.report(1, 2)
    assert rested(run, 2) == ["release 2"]


def test_no_rank_is_started_where_one_was_asked_to_leave_and_those_that_start_are_released() -> None:
    run = Scenario(limits=LIMITS)
    assert run.take(B_LEAVES) == []
    assert run.take(NodeSeen(node="b", capacity=2)) == []
    assert run.take(NodeSeen(node="a", capacity=2)) == ["spawn 1 on a", "spawn 2 on a"]
    assert run.take(NodeLeaving(node="a", why="asked to")) == ["release 1", "release 2"]


def test_a_rank_that_never_comes_to_rest_is_released_all_the_same() -> None:
    run = on_two_nodes()
    run.take(B_LEAVES)
    run.take(GenerationCreated(generation=2))
    run.report(1, 2)
    assert run.take(Tick(), after_s=29.0) == []
    assert run.take(Tick(), after_s=2.0) == ["release 2", "let go of b"]


def test_a_restarted_controller_goes_on_with_it() -> None:
    first = on_two_nodes()
    first.take(B_LEAVES)
    first.take(GenerationCreated(generation=2))
    plans = tuple(first.control.plans[number] for number in (1, 2))
    run = Scenario(limits=LIMITS)
    run.take(Resumed(plans=plans, spawned=((1, "a"), (2, "b"))))
    run.take(B_LEAVES)
    run.report(1, 2)
    assert rested(run, 2) == ["release 2", "let go of b"]


def test_a_controller_that_comes_back_does_not_take_who_was_released_for_lost() -> None:
    first = on_two_nodes()
    first.take(B_LEAVES)
    first.take(GenerationCreated(generation=2))
    run = Scenario(limits=LIMITS)
    run.take(Resumed(plans=tuple(first.control.plans.values()), spawned=((1, "a"), (2, "b"))))
    run.take(B_LEAVES)
    assert run.take(RankGone(member=2, why="it was gone when the controller came back")) == ["kill 2"]
    assert run.report(1, 2) == ["let go of b"]
    assert run.control.chronicle.open is None


def test_a_node_that_dies_in_the_middle_is_lost_as_any_other() -> None:
    run = on_two_nodes()
    run.take(B_LEAVES)
    run.take(GenerationCreated(generation=2))
    assert run.take(NodeGone(node="b", why="silent")) == ["kill 2", "create 3 unplanned from 1 of (1,)"]
    assert state(run) == "drained"
    control: Control = run.control
    assert control.chronicle.open is not None and control.chronicle.open.kind == "node lost"
