"""The recovery ladder: situations, and the decision with its reason."""

from __future__ import annotations

from dataclasses import replace

from resilient.core.dealing import too_few
from resilient.core.events import RankReady
from resilient.core.limits import Limits
from resilient.core.membership import Member, Membership
from resilient.core.plan import Address, Plan
from resilient.core.planner import dealt_anew, unplanned
from resilient.core.recovery import decide
from resilient.core.seat import SeatReport
from resilient.core.situation import Lost, Make, NeedNodes, Situation, Stay

LIMITS = Limits(min_workers=2, max_workers=4)


def member(number: int, *, ready: bool = True, formed: int = 0, broken: int = 0, generation: int = 1) -> Member:
    report = SeatReport(
        member=number,
        generation=generation,
        formed=formed,
        broken=broken,
        step=0,
        complete=-1,
        finished=False,
        waiting=False,
    )
    found = Member(number=number, node=f"node{number}", report=report)
    if ready:
        found.ready = RankReady(
            member=number,
            node=found.node,
            address=Address(host="h", port=number),
            micro_batches=8,
            steps=10,
            probe="p",
            probe_fields="f",
        )
    return found


def beginning(members: list[Member], generation: int = 1) -> Plan:
    return dealt_anew(
        generation=generation,
        base=0,
        kind="initial",
        places=[found.place for found in members],
        joiners=[found.number for found in members[1:]],
        micro_batches=8,
        reason="test",
    )


def situation(members: list[Member], formed: Plan | None, current: Plan | None, newest: int = 1) -> Situation:
    return Situation(
        limits=LIMITS,
        membership=Membership(nodes={}, members={found.number: found for found in members}),
        formed=formed,
        current=current,
        newest=newest,
        inherited=False,
        broken_for_s=0.0,
        waited_s=0.0,
    )


def made(now: Situation) -> Plan:
    decision = decide(now)
    assert isinstance(decision, Make), decision
    return decision.plan


def test_the_run_begins_with_the_minimum_once_nobody_is_starting() -> None:
    assert decide(situation([member(1)], None, None, 0)) == NeedNodes(reason="1 of at least 2 workers are ready")
    starting = situation([member(1), member(2), member(3, ready=False)], None, None, 0)
    assert isinstance(decide(starting), Stay)
    assert made(replace(starting, waited_s=LIMITS.start_together_s)).members == (1, 2)
    plan = made(situation([member(1), member(2)], None, None, 0))
    assert (plan.generation, plan.kind, plan.joiners) == (1, "initial", (2,))


def test_once_it_has_run_those_that_are_ready_wait_for_others_a_moment_only() -> None:
    lost = beginning([member(number, formed=1) for number in (1, 2, 3)])
    now = situation([member(4), member(5), member(6, ready=False)], lost, lost)
    assert isinstance(too_few(replace(now, waited_s=LIMITS.detection_s / 2), ready=2), Stay)
    assert too_few(replace(now, waited_s=LIMITS.detection_s), ready=2) is None
    assert isinstance(too_few(replace(now, waited_s=LIMITS.detection_s, formed=None), ready=2), Stay)


def test_a_lost_rank_leaves_its_leaves_to_the_others() -> None:
    members = [member(number, formed=1) for number in (1, 2, 3)]
    plan = beginning(members)
    members[1].gone = True
    after = made(situation(members, plan, plan))
    assert (after.generation, after.base, after.kind, after.members) == (2, 1, "unplanned", (1, 3))
    assert after.reason == "lost rank 1 (node node2)"


def test_a_lost_rank_with_optimizer_state_of_its_own_is_a_lost_state() -> None:
    members = [member(number, formed=1) for number in (1, 2, 3)]
    plan = replace(beginning(members), sharded=True)
    members[1].gone = True
    decision = decide(situation(members, plan, plan))
    assert isinstance(decision, Lost), decision
    assert decision.reason == "lost rank 1 (node node2); with it went optimizer state that no other rank has"


def test_a_broken_link_is_none() -> None:
    members = [member(1, formed=1, broken=1), member(2, formed=1)]
    plan = replace(beginning(members), sharded=True)
    after = made(replace(situation(members, plan, plan), broken_for_s=LIMITS.settle_s))
    assert (after.kind, after.members, after.sharded) == ("unplanned", (1, 2), True)


def test_the_next_loss_starts_from_what_had_formed_and_takes_a_new_number() -> None:
    members = [member(number, formed=1) for number in (1, 2, 3)]
    plan = beginning(members)
    forming = unplanned(plan, 2, [1, 3], "lost rank 1")
    members[1].gone = True
    assert isinstance(decide(situation(members, plan, forming, 2)), Stay)
    members[2].gone = True
    after = made(replace(situation(members, plan, forming, 2), limits=replace(LIMITS, min_workers=1)))
    assert (after.generation, after.base, after.members) == (3, 1, (1,))


def test_nobody_left_is_said_so() -> None:
    members = [member(number, formed=1) for number in (1, 2)]
    plan = beginning(members)
    for found in members:
        found.gone = True
    decision = decide(situation([*members, member(3)], plan, plan))
    assert isinstance(decision, Lost)
    assert "only they held the state" in decision.reason


def test_below_the_minimum_the_run_waits_unless_it_is_ending() -> None:
    members = [member(number, formed=1) for number in (1, 2)]
    plan = beginning(members)
    members[1].gone = True
    assert isinstance(decide(situation(members, plan, plan)), NeedNodes)
    assert isinstance(decide(situation([*members, member(3)], plan, plan)), Make)
    members[0].digest = "finished"
    assert isinstance(decide(situation(members, plan, plan)), Make)


def test_a_broken_link_is_given_time_to_turn_out_a_death() -> None:
    members = [member(1, formed=1, broken=1), member(2, formed=1)]
    plan = beginning(members)
    now = situation(members, plan, plan)
    assert isinstance(decide(now), Stay)
    assert made(replace(now, broken_for_s=LIMITS.settle_s)).members == (1, 2)


def test_a_link_of_the_base_counts_while_a_planned_generation_is_under_way() -> None:
    # Some have completed the exchange that switches, and wait for this one, which never will.
    members = [member(1, formed=1, generation=2), member(2, formed=1, broken=1), member(3, generation=2)]
    plan = beginning(members[:2])
    wider = replace(beginning(members, 2), base=1, kind="planned", joiners=(3,))
    after = made(replace(situation(members, plan, wider, 2), broken_for_s=LIMITS.settle_s))
    assert (after.generation, after.base, after.kind, after.members) == (3, 1, "unplanned", (1, 2))
    members[1] = member(2, formed=1)
    assert isinstance(decide(situation(members, plan, wider, 2)), Stay)


def test_a_link_that_broke_before_the_current_plan_reached_its_member_does_not_count() -> None:
    members = [member(1, formed=1, broken=1), member(2, formed=1)]
    plan = beginning(members)
    again = unplanned(plan, 2, [1, 2], "a link broke")
    assert isinstance(decide(replace(situation(members, plan, again, 2), broken_for_s=60.0)), Stay)


def test_what_had_formed_after_all_goes_before_what_is_forming() -> None:
    members = [member(1, formed=2), member(2)]
    first, second = beginning(members), beginning(members, 2)
    second = replace(second, reason="second beginning")
    after = made(situation(members, replace(second, generation=2), replace(first, generation=3), 3))
    assert (after.generation, after.base, after.kind) == (4, 2, "unplanned")


def test_joiners_are_seated_while_all_is_well_and_only_up_to_the_maximum() -> None:
    members = [member(number, formed=1) for number in (1, 2, 3)]
    plan = beginning(members)
    coming = [member(number) for number in (4, 5)]
    after = made(situation([*members, *coming], plan, plan))
    assert (after.kind, after.members, after.joiners) == ("planned", (1, 2, 3, 4), (4,))
    members[0].digest = "finished"
    assert decide(situation([*members, *coming], plan, plan)) == Stay(reason="the loop has ended")


def test_an_inherited_beginning_that_vanished_is_no_beginning() -> None:
    # A restarted controller cannot know whether it had formed long ago.
    members = [member(1), member(2)]
    plan = beginning(members)
    for found in members:
        found.gone = True
    fresh = [member(3), member(4)]
    now = situation([*members, *fresh], None, plan)
    assert isinstance(decide(now), Make)
    assert isinstance(decide(replace(now, inherited=True)), Lost)
    members[1].gone = False  # it lives, and reports that nothing has formed: so nothing was committed
    assert isinstance(decide(replace(now, inherited=True)), Make)
