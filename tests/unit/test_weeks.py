"""A run of weeks: however many recoveries there were, the controller remembers no more than after the first ones."""

from __future__ import annotations

import dataclasses
from collections import Counter, deque
from typing import Any

import pytest

from resilient.core.chronicle import MOST_RECOVERIES
from resilient.core.events import GenerationCreated, NodeGone, NodeLeaving, NodeSeen, RankGone, Tick
from resilient.core.story import Story
from resilient.records import Records
from tests.unit.test_control import Scenario


class LongRun(Scenario):
    """Two ranks, of which again and again one dies and is replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.begun()
        self.story = Story()
        self.alive, self.generation, self.step = [1, 2], 1, 1

    def recover(self, times: int) -> None:
        for _ in range(times):
            gone, left, new = self.alive[0], self.alive[1], self.control.next_member
            assert f"spawn {new} on a" in self.take(RankGone(member=gone, why="killed"))
            self._form([left])
            self.ready(new)
            self._form([left, new])
            self.take(Tick(), after_s=5.0)
            self.story.after(Tick(), (), self.control)

    def _form(self, members: list[int]) -> None:
        self.alive, self.generation = members, self.generation + 1
        self.take(GenerationCreated(generation=self.generation))
        for complete in (self.step - 1, self.step):  # as it is formed, and after a step
            for member in members:
                self.report(member, self.generation, step=complete + 1, complete=complete)
        self.step += 1
        assert self.control.formed is not None and self.control.formed.generation == self.generation


class NewNodes(LongRun):
    """Two nodes with a rank each, of which again and again one goes, perhaps in good order, and another comes."""

    def __init__(self) -> None:
        Scenario.__init__(self)
        self.alive, self.generation, self.step = [1, 2], 1, 1
        for member in self.alive:
            self.take(NodeSeen(node=f"n{member}", capacity=1))
            self.ready(member, f"n{member}")
        self.take(GenerationCreated(generation=1))
        for member in self.alive:
            self.report(member, 1)

    def change(self, times: int, *, asked: bool) -> None:
        for _ in range(times):
            (gone, left), new = self.alive, self.control.next_member
            if asked:
                self.take(NodeLeaving(node=f"n{gone}", why="spot", left_s=100.0))
            else:
                self.take(NodeGone(node=f"n{gone}", why="spot"))
                self._form([left])
            self.take(NodeSeen(node=f"n{new}", capacity=1))
            self.ready(new, f"n{new}")
            for fact in (NodeGone(node=f"n{gone}", why="spot"), Tick()):
                if self.control.creating is not None:
                    self._form([left, new])
                self.take(fact)
            self.take(Tick(), after_s=5.0)


def sizes(thing: Any, path: str = "", seen: set[int] | None = None) -> Counter[str]:
    """How many elements all containers in it have, by where they are."""
    seen = set() if seen is None else seen
    found = Counter[str]()
    if id(thing) in seen or isinstance(thing, str | bytes | int | float | type):
        return found
    seen.add(id(thing))
    if isinstance(thing, dict | list | tuple | set | frozenset | deque):
        found[path] += len(thing)
        parts = [(f"{path}[]", each) for each in (thing.values() if isinstance(thing, dict) else thing)]
    elif dataclasses.is_dataclass(thing):
        names = (each.name for each in dataclasses.fields(thing))
        parts = [(f"{path}.{name}", getattr(thing, name)) for name in names]
    else:
        parts = [(f"{path}.{name}", each) for name, each in getattr(thing, "__dict__", {}).items()]
    for place, part in parts:
        found.update(sizes(part, place, seen))
    return found


def grown(before: Counter[str], after: Counter[str]) -> dict[str, tuple[int, int]]:
    return {place: (before[place], count) for place, count in after.items() if count > 1.1 * before[place] + 50}


def test_a_thousand_recoveries_more_leave_nothing_more() -> None:
    run = LongRun()
    run.recover(1000)
    before = sizes((run.control, run.story))
    assert run.control.chronicle.ended == 2000, "of losses and of joins"
    run.recover(1000)
    after = sizes((run.control, run.story))
    assert not grown(before, after) and sum(after.values()) < 20_000


@pytest.mark.parametrize("asked", [False, True])
def test_nor_do_a_thousand_nodes_that_came_and_went(asked: bool) -> None:
    run = NewNodes()
    run.change(1200, asked=asked)
    before = sizes(run.control)
    run.change(1000, asked=asked)
    assert not grown(before, sizes(run.control))


def test_whoever_is_forgotten_stays_gone() -> None:
    run = LongRun()
    run.recover(1000)
    membership = run.control.membership
    assert 3 not in membership.members and membership.is_gone(3)
    assert run.ready(3) == [] and run.report(3, 2, step=9) == []
    assert 3 not in membership.members and membership.count_staying() == 2
    assert not membership.is_gone(run.control.next_member)


def test_the_driver_hears_of_each_recovery() -> None:
    run = LongRun()
    heard = 0
    for times in (1, 2, 600, 0, 3):
        run.recover(times)
        assert len(run.control.chronicle.ended_after(heard)) == min(2 * times, MOST_RECOVERIES)
        heard = run.control.chronicle.ended
    assert heard == 2 * 606


@pytest.mark.parametrize("heard", [0, 7])
def test_rewinds_that_the_driver_has_heard_of_are_forgotten(heard: int) -> None:
    records = Records()
    for generation in range(1, 11):
        records.rewind(generation, 100 - generation, 0, anew=False)
    assert records.back_to(heard) == 90
    assert len(records.rewinds) == 10 - heard and records.last_rewind == 10
    assert records.back_to(10) is None and records.last_rewind == 10
