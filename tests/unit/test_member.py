"""A rank's threads around its seat: who may touch the partial sums, and when."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from resilient.core.instructions import ProbeLinks
from resilient.core.plan import Address, Kind, Place, Plan
from resilient.core.seat import Apply, Compute, Seat
from resilient.member import Member

LEAVES = 4


class Sums:
    """Stands for a rank's numbers of a step: which leaves are in them."""

    def __init__(self) -> None:
        self.inside: set[int] = set()
        self.kept = None
        self.partial = SimpleNamespace(clear=self.inside.clear)

    def accept(self, result: object) -> None:
        self.inside.clear()


def plan(generation: int, leaves: tuple[tuple[int, ...], ...], kind: Kind, base: int) -> Plan:
    places = tuple(Place(member=number, node="n", address=Address(host="h", port=1)) for number in (1, 2))
    return Plan(
        generation=generation,
        base=base,
        kind=kind,
        places=places,
        leaves=leaves,
        micro_batches=LEAVES,
        joiners=(2,) if kind == "initial" else (),
        reason="test",
    )


@pytest.fixture
def member(monkeypatch: pytest.MonkeyPatch) -> Member:
    """In generation 2, a planned change from 1 that has not formed yet, after step 0; a step has four leaves."""
    monkeypatch.setattr(Member, "_form", lambda self, plan: None)
    host: Any = SimpleNamespace(
        member=1, tell=lambda *_: None, words=SimpleNamespace(moved=lambda *_: None, activity=lambda *_: None)
    )
    found = Member(host, workers=(1, 2), reduction="exact", threads=1, device=torch.device("cpu"), snapshots=None)
    loop: Any = SimpleNamespace(sums=Sums(), stage=None)
    found._loop = loop
    first = plan(1, ((0, 1), (2, 3)), "initial", 0)
    found.deliver(first)
    found.formed(first, -1, None)
    compute(found, 2)
    found.deliver(plan(2, ((0, 1, 2), (3,)), "planned", 1))
    result: Any = None
    agreed: Any = SimpleNamespace(capture=False)
    found.exchanged(first, 0, 2, agreed, result)
    assert isinstance(found.next(), Apply)
    found.committed([1.0])
    found.applied({})
    return found


def sums(member: Member) -> Sums:
    found: Any = member.sums
    return found


def compute(member: Member, leaves: int) -> None:
    for _ in range(leaves):
        begin_and_fold(member)


def begin_and_fold(member: Member) -> None:
    todo = member.next()
    assert isinstance(todo, Compute)
    sums(member).inside.add(todo.leaf)
    member.folded(todo.leaf)


def seat(member: Member) -> Seat:
    return member._seat


def test_sums_are_not_dropped_while_a_leaf_is_folded_into_them(member: Member) -> None:
    """A planned change fails while this rank computes by it; what it has counts for nothing, this leaf included."""
    compute(member, 2)
    todo = member.next()
    assert todo == Compute(leaf=2)
    sums(member).inside.add(2)  # and before this is told
    instead = plan(3, ((0, 2), (1, 3)), "unplanned", 1)
    member.deliver(instead)
    member.formed(instead, 0, None)
    assert sums(member).inside == {0, 1, 2}, "this thread is not the one that folds"
    member.folded(2)
    assert sums(member).inside == seat(member).folded == set()
    compute(member, 2)
    assert sums(member).inside == seat(member).folded == {0, 2}


def test_a_leaf_that_is_another_rank_s_by_now_is_dropped_with_the_sums_that_it_lies_in(member: Member) -> None:
    compute(member, 2)
    assert member.next() == Compute(leaf=2)
    instead = plan(3, ((0, 1), (2, 3)), "unplanned", 1)
    member.deliver(instead)
    member.formed(instead, 0, None)
    sums(member).inside.add(2)
    member.folded(2)
    compute(member, 2)
    assert sums(member).inside == seat(member).folded == {0, 1}


def test_links_are_probed_once_at_a_time(member: Member, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where others are many it takes longer than until it is asked for again."""
    probed: list[int] = []
    asked = ProbeLinks(generation=2, places=plan(2, ((0, 1, 2), (3,)), "planned", 1).places)

    def unreachable(others: dict[int, object], secret: str, limit_s: float) -> tuple[int, ...]:
        probed.append(len(others))
        member._probe_links(asked)
        return ()

    monkeypatch.setattr("resilient.member.unreachable", unreachable)
    member._host.secret = "s"
    member._probe_links(asked)
    assert probed == [1]
    member._probe_links(asked)
    assert probed == [1, 1]
