"""Who leaves in a planned change, and who comes in the same step."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from resilient.core import dealing, draining
from resilient.core.events import RankReady
from resilient.core.limits import Limits
from resilient.core.membership import Membership
from resilient.core.partition import DoesNotFit
from resilient.core.plan import Address, Plan
from resilient.core.planner import dealt_anew
from resilient.core.recovery import decide
from resilient.core.seat import SeatReport
from resilient.core.situation import Make, Situation, Stay
from resilient.core.standing import Member

NEVER = float("inf")


def member(number: int, node: str, *, formed: int, leaving: bool = False, leave_by: float = NEVER) -> Member:
    return Member(
        number=number,
        node=node,
        leaving=leaving,
        leave_by=leave_by,
        ready=RankReady(
            member=number,
            node=node,
            address=Address(host="h", port=number),
            micro_batches=8,
            steps=9,
            probe="p",
            probe_fields="f",
        ),
        report=SeatReport(
            member=number, generation=formed, formed=formed, broken=0, step=1, complete=0, finished=False, waiting=False
        ),
    )


def situation(
    seated: str, ready: str = "", *, least: int = 1, most: int = 4, room: bool = False, micro_batches: int = 8
) -> tuple[Membership, Plan, Limits]:
    """One rank on each of these nodes: capitals are to leave, the later in the alphabet the later they end."""
    nodes = [*seated, *ready]
    members = [
        member(number, node, formed=int(number <= len(seated)), leaving=node.isupper(), leave_by=float(ord(node)))
        for number, node in enumerate(nodes, 1)
    ]
    leaving = {node: float(ord(node)) for node in nodes if node.isupper()}
    capacities = dict.fromkeys(nodes, 1) | ({"z": 1} if room else {})
    membership = Membership(nodes=capacities, members={found.number: found for found in members}, leaving=leaving)
    places = [found.place for found in members[: len(seated)]]
    plan = dealt_anew(
        generation=1, base=0, kind="initial", places=places, joiners=[], micro_batches=micro_batches, reason="test"
    )
    membership.keep(plan)
    return membership, plan, Limits(min_workers=least, max_workers=most)


def chosen(*asked: str, **limits: int) -> tuple[str, str, str, bool]:
    """Nodes of those that stay, leave and join, and whether more are worth waiting for."""
    membership, plan, allowed = situation(*asked, **limits)  # type: ignore[arg-type]
    found = draining.choose(
        membership, plan, least=allowed.min_workers, most=allowed.max_workers, wanted=allowed.max_workers
    )
    assert bool(found.short) == (not found.leave and not found.join), found
    names = ["".join(member.node for member in group) for group in (found.stay, found.leave, found.join)]
    return names[0], names[1], names[2], found.waits


@pytest.mark.parametrize(
    ("asked", "limits", "expected"),
    [
        (("aBc",), {}, ("ac", "B", "", False)),
        (("aBc",), {"least": 2}, ("ac", "B", "", False)),
        (("aBc",), {"least": 3}, ("aBc", "", "", False)),
        (("aBcD", "e"), {"least": 3}, ("ac", "BD", "e", False)),
        (("aBcD",), {"least": 3}, ("acD", "B", "", False)),  # the one that lives longer stays
        (("aBc", "def"), {"most": 3}, ("ac", "B", "d", False)),
        (("aBc",), {"room": True}, ("ac", "B", "", True)),
        (("aBc", "d"), {"room": True, "most": 3}, ("ac", "B", "d", False)),
        (("AB",), {}, ("B", "A", "", False)),  # one at least holds the state
        (("B",), {}, ("B", "", "", False)),
        (("B", "c"), {"most": 1}, ("B", "", "c", False)),  # handed over: one more than `most` for a moment
        (("BC", "de"), {"least": 2, "most": 2}, ("C", "B", "de", False)),
        (("BC", "d"), {"least": 2, "most": 2}, ("C", "B", "d", False)),
        (("Bd",), {"least": 1, "most": 1}, ("d", "B", "", False)),  # and then it leaves
        (("B", "c"), {"most": 1, "micro_batches": 1}, ("B", "", "", False)),  # no micro-batch for two
    ],
)
def test_who_leaves_and_who_joins(
    asked: tuple[str, ...], limits: dict[str, int], expected: tuple[str, str, str, bool]
) -> None:
    assert chosen(*asked, **limits) == expected


def decided(*asked: str, may_wait_s: float = 0.0, **limits: int) -> Make | Stay:
    membership, plan, allowed = situation(*asked, **limits)  # type: ignore[arg-type]
    now = Situation(
        limits=allowed,
        membership=membership,
        formed=plan,
        current=plan,
        newest=1,
        inherited=False,
        broken_for_s=0.0,
        waited_s=0.0,
        may_wait_s=may_wait_s,
    )
    decision = decide(now)
    assert isinstance(decision, Make | Stay)
    return decision


def test_a_drain_is_a_planned_change() -> None:
    decision = decided("aBc", "d")
    assert isinstance(decision, Make)
    plan = decision.plan
    assert (plan.kind, plan.base, plan.members, plan.joiners) == ("planned", 1, (1, 3, 4), (4,))
    assert plan.leaves == ((0, 1, 2), (3, 4, 5), (6, 7))
    assert plan.reason == "1 left (node B), 1 joined (node d)"


def test_optimizer_state_is_handed_over_first() -> None:
    """Those that join come later."""
    membership, plan, allowed = situation("aBc", "d")
    now = Situation(
        limits=allowed,
        membership=membership,
        formed=plan,
        current=plan,
        newest=1,
        inherited=False,
        broken_for_s=0.0,
        waited_s=0.0,
    )
    first = decide(replace(now, current=replace(plan, sharded=True), formed=replace(plan, sharded=True)))
    assert isinstance(first, Make)
    assert (first.plan.kind, first.plan.members, first.plan.emptied) == ("planned", (1, 2, 3), (2,))
    emptied = replace(plan, sharded=True, emptied=(2,))
    second = decide(replace(now, current=emptied, formed=emptied))
    assert isinstance(second, Make)
    assert (second.plan.members, second.plan.joiners, second.plan.emptied) == ((1, 3, 4), (4,), ())


def test_so_is_that_of_a_rank_which_new_stages_leave_out(monkeypatch: pytest.MonkeyPatch) -> None:
    membership, plan, allowed = situation("abc")
    plan = replace(plan, sharded=True)
    now = Situation(
        limits=allowed,
        membership=membership,
        formed=plan,
        current=plan,
        newest=1,
        inherited=False,
        broken_for_s=0.0,
        waited_s=0.0,
    )
    asked: list[set[int]] = []

    def staging(now: Situation, members: list[Member], leaving: Collection[int] = ()) -> Any:
        asked.append(set(leaving))
        if leaving:
            raise DoesNotFit("asked again")
        return SimpleNamespace(seated=(1, 3), reason="fewer stages")

    monkeypatch.setattr(dealing, "_staging", staging)
    assert dealing.dealt(now, [], plan, "test") == Stay(reason="asked again", stuck=True)
    assert asked == [set(), {2}]


def test_replacements_are_waited_for_as_long_as_there_is_time() -> None:
    assert isinstance(decided("aBc", room=True, may_wait_s=3.0), Stay)
    assert isinstance(decided("aBc", room=True), Make)


def test_it_says_why_nobody_can_leave() -> None:
    stays = decided("aBc", least=3)
    assert stays == Stay(
        reason="not yet: 2 of at least 3 workers would be left, and there is no room elsewhere: add nodes", stuck=True
    )
    assert decided("B", room=True) == Stay(reason="not yet: no worker would be left", stuck=False)
