"""What is kept of members as they change, against counting all of them anew."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from resilient.core.events import RankReady
from resilient.core.membership import Membership
from resilient.core.plan import Address, Place, Plan
from resilient.core.planner import dealt_anew
from resilient.core.seat import Rollback, SeatReport
from resilient.core.standing import Tally

WHATS = ("gone", "leaving", "starting", "ready", "holding", "broken", "left", "waiting", "rollback", "digest")
NODES = ("a", "b", "c")
BACK = Rollback(back_to=1, skip_from=None, skip_to=2, why="test")


def plan_of(generation: int, members: list[int]) -> Plan:
    return dealt_anew(
        generation=generation,
        base=0,
        kind="initial",
        places=[Place(member=number, node="a", address=Address(host="h", port=1)) for number in members],
        joiners=[],
        micro_batches=len(members),
        reason="test",
    )


@st.composite
def reports(draw: st.DrawFn, member: int) -> SeatReport:
    few = st.integers(0, 2)
    return SeatReport(
        member=member,
        generation=draw(few),
        formed=draw(few),
        broken=draw(few),
        step=draw(few),
        complete=-1,
        finished=draw(st.booleans()),
        waiting=draw(st.booleans()),
        rollback=draw(st.sampled_from([None, BACK, replace(BACK, back_to=0)])),
    )


def change(data: st.DataObject, membership: Membership, number: int) -> None:
    member = membership.new_member(number, NODES[number % 3])
    match data.draw(st.sampled_from(["nothing", "ready", "report", "report", "digest", "gone", "leaving"])):
        case "ready":
            at = Address(host="h", port=1)
            member.ready = RankReady(
                member=number, node=member.node, address=at, micro_batches=4, steps=1, probe="p", probe_fields="f"
            )
        case "report":
            member.report = data.draw(reports(number))
        case "digest":
            member.digest = data.draw(st.sampled_from(["d", "e"]))
        case "gone":
            member.gone = True
        case "leaving":
            member.leaving = True
    membership.changed(member)


def counts(tally: Tally) -> dict[str, tuple[set[object], set[int], int]]:
    return {what: (set(tally.values(what)), tally.numbers(what), tally.count(what)) for what in WHATS}  # type: ignore[arg-type]


def check(membership: Membership, plans: list[Plan]) -> None:
    nodes, leaving, avoided = dict(membership.nodes), membership.leaving, membership.avoided
    anew = Membership(nodes=nodes, members=membership.members, leaving=leaving, avoided=avoided)
    assert counts(membership.everybody) == counts(anew.everybody)
    for plan in plans:
        assert counts(membership.tally(plan)) == counts(anew.tally(plan))
        assert membership.strays(plan) == anew.strays(plan)
        assert membership.count_ready_outside(plan) == len(anew.ready_unseated(plan.members))
    living = membership.alive()
    assert membership.leavers() == [member for member in living if member.leaving]
    assert membership.count_staying() == len(living) - len(membership.leavers())
    assert membership.first_ready() == next((member.ready for member in living if member.ready is not None), None)
    room = {}
    for node in NODES:
        assert membership.on_node(node) == [member for member in living if member.node == node]
        room[node] = membership.nodes.get(node, 0) - len(membership.on_node(node))
    usable = {node: room[node] for node in sorted(membership.nodes.keys() - leaving.keys()) if room[node] > 0}
    preferred = {node: free for node, free in usable.items() if node not in avoided} or usable
    assert membership.roomiest() == max(preferred, key=preferred.__getitem__, default=None)


@settings(deadline=None)  # a busy machine is no finding
@given(st.data())
def test_what_is_kept_is_what_counting_anew_would_find(data: st.DataObject) -> None:
    membership, plans = Membership(), list[Plan]()
    for turn in range(data.draw(st.integers(0, 40))):
        match data.draw(
            st.sampled_from(
                ["change", "change", "change", "node comes", "node goes", "node leaves", "node is avoided", "plan"]
            )
        ):
            case "change":
                change(data, membership, data.draw(st.integers(1, 8)))
            case "node comes":
                membership.node_seen(data.draw(st.sampled_from(NODES)), data.draw(st.integers(0, 3)))
            case "node goes":
                membership.node_gone(data.draw(st.sampled_from(NODES)))
            case "node leaves":
                membership.node_leaves(data.draw(st.sampled_from(NODES)), 1.0)
            case "node is avoided":
                membership.avoid(data.draw(st.sampled_from(NODES)))
            case "plan" if membership.members:
                some = data.draw(st.sets(st.sampled_from(sorted(membership.members)), min_size=1))
                plans = [*plans[-data.draw(st.integers(0, 1)) :][-1:], plan_of(turn + 1, sorted(some))]
                membership.keep(*plans)
        check(membership, plans)
