"""One rank's protocol, told as short scenarios; an event that can't be raises and changes nothing."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest

from resilient.core.plan import Address, Kind, Place, Plan, Restore, Stage
from resilient.core.planner import even_runs
from resilient.core.seat import (
    Applied,
    Apply,
    Compute,
    Discard,
    ExchangeDone,
    ExchangeFailed,
    Finished,
    Form,
    Formed,
    FormFailed,
    LeafFolded,
    MayBegin,
    Park,
    PlanArrived,
    Reduce,
    Report,
    Rested,
    Rollback,
    Seat,
    SeatEvent,
    StateReceived,
    Wait,
)
from snapshot.core.inventory import SnapshotKey

RESTORE = Restore(key=SnapshotKey(attempt=1, branch=0, step=1, generation=1))


def plan(
    generation: int,
    members: tuple[int, ...],
    *,
    base: int = 0,
    kind: Kind = "initial",
    joiners: tuple[int, ...] | None = None,
    leaves: tuple[tuple[int, ...], ...] | None = None,
) -> Plan:
    if joiners is None:
        joiners = members[1:] if kind == "initial" else ()
    return Plan(
        generation=generation,
        base=base,
        kind=kind,
        places=tuple(Place(member=number, node="n", address=Address(host="h", port=number)) for number in members),
        leaves=leaves or even_runs(4, len(members)),
        micro_batches=4,
        joiners=joiners,
        reason="test",
    )


def seated(member: int = 1, step: int = 0) -> Seat:
    """A member of generation 1 = {1, 2}, formed, that has applied everything before `step`."""
    seat = Seat(member=member)
    seat.handle(PlanArrived(plan=plan(1, (1, 2))))
    if member != 1:
        seat.handle(StateReceived(generation=1, complete=-1))
    seat.handle(Formed(generation=1, complete=-1))
    for number in range(step):
        fold_all(seat)
        seat.handle(ExchangeDone(generation=1, step=number, agreed=1))
        seat.handle(Applied(step=number))
    return seat


def fold_all(seat: Seat) -> None:
    while isinstance(todo := seat.next(), Compute):
        seat.handle(LeafFolded(step=seat.step, leaf=todo.leaf))


def unchanged(seat: Seat, event: SeatEvent) -> None:
    before = deepcopy(seat)
    with pytest.raises(AssertionError):
        seat.handle(event)
    assert seat == before


def test_a_step() -> None:
    seat = Seat(member=1)
    assert seat.next() == Wait(reason="waiting to be seated")
    first = plan(1, (1, 2))
    assert seat.handle(PlanArrived(plan=first)) == (Form(plan=first),)
    assert seat.next() == Wait(reason="forming generation 1")
    assert seat.handle(Formed(generation=1, complete=-1)) == (Report(),)
    assert seat.next() == Compute(leaf=0)
    seat.handle(LeafFolded(step=0, leaf=0))
    assert seat.next() == Compute(leaf=1)
    seat.handle(LeafFolded(step=0, leaf=1))
    assert seat.next() == Reduce(plan=first, step=0)
    assert seat.report().waiting
    seat.handle(ExchangeDone(generation=1, step=0, agreed=1))
    assert seat.next() == Apply(step=0)
    seat.handle(Applied(step=0))
    assert (seat.step, seat.next()) == (1, Compute(leaf=0))


def test_after_a_loss_only_the_added_leaves_are_computed() -> None:
    seat = seated()
    fold_all(seat)
    alone = plan(2, (1,), base=1, kind="unplanned")
    assert seat.handle(PlanArrived(plan=alone)) == (Form(plan=alone),)
    assert seat.next() == Wait(reason="forming generation 2")
    assert seat.handle(Formed(generation=2, complete=-1)) == (Report(),)
    assert [seat.next(), seat.folded] == [Compute(leaf=2), {0, 1}]
    fold_all(seat)
    assert seat.next() == Reduce(plan=alone, step=0)


def test_while_a_generation_forms_own_leaves_are_computed_on() -> None:
    seat = seated()
    seat.handle(PlanArrived(plan=plan(2, (1,), base=1, kind="unplanned")))
    fold_all(seat)
    assert seat.folded == {0, 1}


def test_whoever_lacks_a_result_gets_it_when_forming_and_applies_it() -> None:
    seat = seated(step=1)
    fold_all(seat)
    seat.handle(ExchangeFailed(generation=1, step=1))
    assert seat.next() == Wait(reason="a link of generation 1 broke")
    assert seat.report().broken == 1
    seat.handle(PlanArrived(plan=plan(2, (1,), base=1, kind="unplanned")))
    seat.handle(Formed(generation=2, complete=1))
    assert seat.next() == Apply(step=1)


def test_what_an_abandoned_generation_brings_is_refused() -> None:
    seat = seated()
    fold_all(seat)
    seat.handle(PlanArrived(plan=plan(2, (1,), base=1, kind="unplanned")))
    before = deepcopy(seat)
    late: list[SeatEvent] = [
        ExchangeDone(generation=1, step=0, agreed=1),
        ExchangeFailed(generation=1, step=0),
        FormFailed(generation=1),
        Formed(generation=1, complete=-1),
        StateReceived(generation=1, complete=3),
        PlanArrived(plan=plan(1, (1, 2))),
    ]
    for event in late:
        assert seat.handle(event) == ()
        assert seat == before


def test_a_planned_change_happens_when_all_hold_it() -> None:
    seat = seated()
    wider = plan(2, (1, 2, 3), base=1, kind="planned", joiners=(3,))
    assert seat.handle(PlanArrived(plan=wider)) == ()
    assert seat.newest_held == 2
    fold_all(seat)
    assert seat.handle(ExchangeDone(generation=1, step=0, agreed=1)) == ()
    seat.handle(Applied(step=0))
    fold_all(seat)
    assert seat.handle(ExchangeDone(generation=1, step=1, agreed=2)) == (Form(plan=wider),)
    assert (seat.next(), seat.at_boundary) == (Apply(step=1), False)
    seat.handle(Applied(step=1))
    assert (seat.next(), seat.at_boundary) == (Wait(reason="forming generation 2"), True)
    seat.handle(Formed(generation=2, complete=1))
    assert seat.next() == Compute(leaf=0)


def changing(wider: Plan) -> Seat:
    """Step 0 is complete and applied, and this plan adopted with it."""
    seat = seated()
    seat.handle(PlanArrived(plan=wider))
    fold_all(seat)
    seat.handle(ExchangeDone(generation=1, step=0, agreed=2))
    seat.handle(Applied(step=0))
    return seat


def test_the_step_goes_on_as_soon_as_the_state_is_held_for_the_joiners() -> None:
    seat = changing(plan(2, (1, 2, 3), base=1, kind="planned", joiners=(3,)))
    assert seat.awaited and not seat.settled
    seat.handle(MayBegin(generation=1, complete=0))
    assert seat.awaited, "of another generation"
    seat.handle(MayBegin(generation=2, complete=0))
    assert not seat.awaited and not seat.settled
    assert seat.next() == Compute(leaf=0) and seat.work == {0, 1}
    fold_all(seat)
    assert seat.next() == Wait(reason="forming generation 2"), "without them it can't be completed"
    seat.handle(Formed(generation=2, complete=0))
    assert isinstance(seat.next(), Reduce) and seat.settled


def test_nobody_waits_for_a_planned_change_without_joiners() -> None:
    seat = changing(plan(2, (1, 2), base=1, kind="planned", leaves=((0,), (1, 2, 3))))
    assert not seat.awaited and seat.next() == Compute(leaf=0) and seat.work == {0}


def test_what_was_computed_for_a_change_that_failed_is_dropped_unless_it_is_this_rank_s() -> None:
    for leaves, dropped in ((((0, 1), (2, 3)), False), (((2, 3), (0, 1)), True)):
        seat = changing(plan(2, (1, 2, 3), base=1, kind="planned", joiners=(3,)))
        seat.handle(MayBegin(generation=2, complete=0))
        fold_all(seat)
        seat.handle(PlanArrived(plan=plan(3, (1, 2), base=1, kind="unplanned", leaves=leaves)))
        assert (Discard() in seat.handle(Formed(generation=3, complete=0))) is dropped
        assert bool(seat.folded) is not dropped


def staged(generation: int, members: tuple[int, ...], base: int, kind: Kind, joiners: tuple[int, ...] = ()) -> Plan:
    """A pipeline with one stage."""
    dealt = plan(generation, members, base=base, kind=kind, joiners=joiners)
    return replace(dealt, stages=(Stage(first=0, stop=2, ranks=tuple(range(len(members)))),))


def begun_ahead() -> Seat:
    """By generation 2, which has not formed, and its whole share of step 1 computed."""
    seat = changing(staged(2, (1, 2, 3), base=1, kind="planned", joiners=(3,)))
    assert seat.next() == Wait(reason="forming generation 2") and not seat.settled
    seat.handle(MayBegin(generation=2, complete=0))
    assert seat.has_begun_ahead and not seat.settled and seat.next() == Compute(leaf=0)
    fold_all(seat)
    return seat


def test_a_rank_of_a_pipeline_begins_when_it_can_compute_and_waits_with_the_update() -> None:
    seat = begun_ahead()
    assert seat.next() == Wait(reason="forming generation 2")
    seat.handle(Formed(generation=2, complete=0))
    assert isinstance(seat.next(), Reduce) and seat.settled and not seat.has_begun_ahead


def test_what_a_pipeline_computed_by_a_change_that_failed_is_dropped() -> None:
    seat, back = begun_ahead(), staged(3, (1, 2), base=1, kind="unplanned")
    assert seat.handle(PlanArrived(plan=back)) == (Discard(), Form(plan=back))
    assert seat.next() == Wait(reason="forming generation 3"), "by the layers that are here no more"
    seat.handle(Formed(generation=3, complete=0))
    assert seat.next() == Compute(leaf=0) and not seat.folded


def test_what_a_pipeline_computed_by_a_change_that_others_saw_formed_is_kept() -> None:
    seat = begun_ahead()
    folded = set(seat.folded)
    on = staged(3, (1, 2), base=2, kind="unplanned")
    assert seat.handle(PlanArrived(plan=on)) == (Form(plan=on),)
    assert seat.folded == folded
    assert Discard() not in seat.handle(Formed(generation=3, complete=0)) and seat.folded == folded


@pytest.mark.parametrize("received", [False, True])
def test_a_joiner_that_has_begun_parks_before_it_joins_once_more(received: bool) -> None:
    seat = Seat(member=3)
    seat.handle(PlanArrived(plan=staged(2, (1, 2, 3), base=1, kind="planned", joiners=(3,))))
    seat.handle(MayBegin(generation=2, complete=4))
    assert (seat.step, seat.has_state) == (5, False)
    fold_all(seat)
    if received:
        seat.handle(StateReceived(generation=2, complete=4))
        assert seat.folded == seat.work
    seat.handle(PlanArrived(plan=staged(4, (1, 2, 3), base=3, kind="planned", joiners=(3,))))
    assert seat.next() == Park() and seat.restoring
    seat.handle(MayBegin(generation=4, complete=6))
    assert (seat.step, seat.next()) == (7, Compute(leaf=min(seat.work)))


def test_a_leaf_that_was_begun_for_a_change_that_failed_meanwhile_does_not_count() -> None:
    seat = changing(plan(2, (1, 2), base=1, kind="planned", leaves=((0, 1, 2), (3,))))
    seat.handle(LeafFolded(step=1, leaf=0))
    seat.handle(LeafFolded(step=1, leaf=1))
    assert seat.next() == Compute(leaf=2)
    seat.handle(PlanArrived(plan=plan(3, (1, 2), base=1, kind="unplanned")))
    assert Discard() not in seat.handle(Formed(generation=3, complete=0))
    assert seat.handle(LeafFolded(step=1, leaf=2)) == (Discard(),)
    assert seat.next() == Compute(leaf=0), "its sum lies with those of the others"


def test_a_death_cancels_a_proposal() -> None:
    seat = seated()
    seat.handle(PlanArrived(plan=plan(2, (1, 2, 3), base=1, kind="planned", joiners=(3,))))
    alone = plan(3, (1,), base=1, kind="unplanned")
    assert seat.handle(PlanArrived(plan=alone)) == (Form(plan=alone),)
    assert (seat.proposal, seat.newest_held) == (None, 3)


def test_a_plan_from_before_the_newest_formed_one_is_refused_with_a_report() -> None:
    seat = seated()
    seat.handle(PlanArrived(plan=plan(2, (1,), base=1, kind="unplanned")))
    seat.handle(Formed(generation=2, complete=-1))
    before = deepcopy(seat)
    assert seat.handle(PlanArrived(plan=plan(3, (1, 2), base=1, kind="unplanned"))) == (Report(),)
    assert seat == before


def test_a_joiner_begins_at_the_step_of_the_others() -> None:
    seat = Seat(member=3)
    seat.handle(PlanArrived(plan=plan(5, (1, 3), base=4, kind="planned", joiners=(3,))))
    seat.handle(StateReceived(generation=5, complete=6))
    assert (seat.step, seat.has_state) == (7, True)
    seat.handle(Formed(generation=5, complete=6))
    assert (seat.step, seat.next()) == (7, Compute(leaf=2))


def test_a_joiner_keeps_to_its_generation_when_the_next_plan_comes_before_it_sees_it_formed() -> None:
    # The others may have seen it formed, and wait in it; all switch together, after an exchange.
    seat = Seat(member=3)
    seat.handle(PlanArrived(plan=plan(5, (1, 3), base=4, kind="planned", joiners=(3,))))
    wider = plan(6, (1, 3, 4), base=5, kind="planned", joiners=(4,))
    assert seat.handle(PlanArrived(plan=wider)) == ()
    assert seat.plan is not None
    assert (seat.plan.generation, seat.newest_held) == (5, 6)


def test_a_joiner_that_holds_the_state_may_be_the_only_one_left() -> None:
    # Another member saw generation 5 formed, reported so, and died.
    seat = Seat(member=3)
    seat.handle(PlanArrived(plan=plan(5, (1, 3), base=4, kind="planned", joiners=(3,))))
    seat.handle(StateReceived(generation=5, complete=6))
    seat.handle(PlanArrived(plan=plan(6, (3,), base=5, kind="unplanned")))
    assert seat.has_state
    seat.handle(Formed(generation=6, complete=6))
    assert (seat.step, seat.next()) == (7, Compute(leaf=0))


def test_a_beginning_that_had_formed_after_all_is_taken_up_with_its_state() -> None:
    seat = Seat(member=2)
    seat.handle(PlanArrived(plan=plan(1, (1, 2))))
    seat.handle(StateReceived(generation=1, complete=-1))
    seat.handle(PlanArrived(plan=plan(2, (1, 2))))
    assert not seat.has_state
    seat.handle(PlanArrived(plan=plan(3, (2,), base=1, kind="unplanned")))
    assert seat.has_state


def test_a_joiner_that_is_proposed_again_has_to_receive_the_state_again() -> None:
    seat = Seat(member=3)
    seat.handle(PlanArrived(plan=plan(5, (1, 3), base=4, kind="planned", joiners=(3,))))
    seat.handle(StateReceived(generation=5, complete=6))
    seat.handle(PlanArrived(plan=plan(7, (1, 3), base=6, kind="planned", joiners=(3,))))
    assert not seat.has_state


def test_the_end() -> None:
    seat = seated(step=2)
    assert seat.handle(Finished(step=2)) == (Report(),)
    assert (seat.report().finished, seat.report().step, seat.report().waiting) == (True, 2, False)


@pytest.mark.parametrize(
    "event",
    [
        Applied(step=0),
        Applied(step=1),
        LeafFolded(step=0, leaf=3),
        LeafFolded(step=1, leaf=0),
        Finished(step=0),
        ExchangeDone(generation=1, step=0, agreed=1),
        ExchangeDone(generation=1, step=2, agreed=1),
        Formed(generation=1, complete=0),
        StateReceived(generation=1, complete=0),
    ],
)
def test_an_event_that_cannot_be_raises_and_changes_nothing(event: Any) -> None:
    seat = seated(step=1)
    seat.handle(LeafFolded(step=1, leaf=0))
    unchanged(seat, event)


def test_more_than_one_step_apart_is_a_mistake() -> None:
    seat = seated()
    seat.handle(PlanArrived(plan=plan(2, (1,), base=1, kind="unplanned")))
    unchanged(seat, Formed(generation=2, complete=1))


def leaving(step: int = 0) -> Seat:
    """Member 2 of generation 1 = {1, 2}, which generation 2 = {1} goes on without after `step`."""
    seat = seated(2, step)
    seat.handle(PlanArrived(plan=plan(2, (1,), base=1, kind="planned")))
    assert seat.newest_held == 2, "the others can't switch before it holds the plan"
    fold_all(seat)
    assert seat.handle(ExchangeDone(generation=1, step=step, agreed=2)) == ()
    return seat


def test_whoever_the_others_go_on_without_applies_the_step_and_comes_to_rest() -> None:
    seat = leaving()
    assert seat.next() == Apply(step=0)
    seat.handle(Rested())
    seat = leaving()
    seat.handle(Applied(step=0))
    assert seat.next() == Wait(reason="generation 2 goes on without this rank")
    assert not seat.report().at_rest
    assert seat.handle(Rested()) == (Report(),)
    assert seat.report().at_rest and (seat.step, seat.report().generation) == (1, 1)
    assert seat.handle(PlanArrived(plan=plan(2, (1,), base=1, kind="planned"))) == (), "sent again, changes nothing"


def test_whoever_rests_is_called_back_when_the_others_could_not_go_on() -> None:
    seat = leaving()
    seat.handle(Applied(step=0))
    seat.handle(Rested())
    again = plan(3, (1, 2), base=1, kind="unplanned")
    assert seat.handle(PlanArrived(plan=again)) == (Form(plan=again),)
    assert (seat.departed, seat.at_rest, seat.has_state) == (0, False, True)
    seat.handle(Rested())
    assert not seat.at_rest, "said too late"
    seat.handle(Formed(generation=3, complete=0))
    assert seat.next() == Compute(leaf=2)


def test_an_exchange_that_breaks_leaves_nobody_out() -> None:
    seat = seated(2)
    seat.handle(PlanArrived(plan=plan(2, (1,), base=1, kind="planned")))
    fold_all(seat)
    seat.handle(ExchangeFailed(generation=1, step=0))
    again = plan(3, (1, 2), base=1, kind="unplanned")
    assert seat.handle(PlanArrived(plan=again)) == (Form(plan=again),)
    assert (seat.departed, seat.proposal) == (0, None)


def test_an_unplanned_generation_without_this_rank_says_nothing_to_it() -> None:
    seat = seated(2)
    before = deepcopy(seat)
    assert seat.handle(PlanArrived(plan=plan(2, (1,), base=1, kind="unplanned"))) == ()
    assert seat == before


WANTED = Rollback(back_to=0, skip_from=0, skip_to=-1, why="layers differ")


def test_a_rollback_may_be_wanted_while_a_planned_generation_forms() -> None:
    seat = seated()
    seat.handle(PlanArrived(plan=plan(2, (1, 2, 3), base=1, kind="planned", joiners=(3,))))
    seat.handle(ExchangeDone(generation=1, step=0, agreed=2))
    seat.handle(Applied(step=0))
    assert seat.forming and seat.handle(WANTED) == (Report(),)
    assert seat.report().rollback == WANTED and isinstance(seat.next(), Wait)
    restored = replace(plan(3, (1, 2, 3), base=1), kind="restored", joiners=(), restore=RESTORE)
    (form,) = seat.handle(PlanArrived(plan=restored))
    assert isinstance(form, Form) and seat.restoring and seat.report().rollback is None


def test_a_joiner_has_nothing_to_go_back_from() -> None:
    seat = Seat(member=3)
    seat.handle(PlanArrived(plan=plan(2, (1, 2, 3), base=1, kind="planned", joiners=(3,))))
    seat.handle(WANTED)
    assert seat.report().rollback is None
