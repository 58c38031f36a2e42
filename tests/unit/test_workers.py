"""What closed connections say about a node, and what keepers are told of ranks that have ended."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError

from actors import launch
from actors.keeper import Pulse
from resilient.job import Snapshot
from resilient.workers import Workers
from tests.jobs import job


class AtOnce:
    """Errands without a thread; those that are `held` wait."""

    def __init__(self) -> None:
        self.held: list[tuple[Callable[[], Any], Callable[[Any], None]]] | None = None

    def run(self, work: Callable[[], Any], then: Callable[[Any], None] = lambda _: None) -> None:
        if self.held is None:
            then(work())
        else:
            self.held.append((work, then))

    def go_on(self) -> None:
        orders, self.held = self.held or [], None
        for work, then in orders:
            then(work())


class Keeper:
    def __init__(self) -> None:
        self.killed: list[int] = []
        self.known_dead: tuple[int, ...] = ()
        self.kill = SimpleNamespace(remote=self.killed.append)
        self.renew = SimpleNamespace(remote=self._renew)

    def _renew(self, _: object, known_dead: tuple[int, ...]) -> None:
        self.known_dead = known_dead


def pulse(member: int, *, alive: bool) -> Pulse:
    return Pulse(member=member, alive=alive, stopped=False, activity="computing", work=3, longest_s=0.1)


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Workers:
    monkeypatch.setattr(launch, "start_keeper", lambda spec, controller: Keeper())
    monkeypatch.setattr(launch, "end", lambda handle: None)
    monkeypatch.setattr(launch, "write_key", lambda key, value: None)
    errands: Any = AtOnce()
    found = Workers(job("r", secret="x", snapshot=Snapshot()), None, errands, never_began=pytest.fail)
    found.start_keeper("n")
    return found


def test_a_node_whose_keeper_and_ranks_have_all_ended_is_gone(workers: Workers) -> None:
    assert workers.lifeline_closed("rank 5 n", [5], 0.0) is None
    assert workers.lifeline_closed("keeper 0 n", [5], 0.1) == "n"


def test_a_rank_that_ends_while_its_keeper_is_replaced_says_nothing_about_the_node(workers: Workers) -> None:
    assert workers.lifeline_closed("keeper 0 n", [5], 0.0) is None and workers.lonely(10.0) == ["n"]
    workers.forget_keeper("n")
    workers.start_keeper("n")
    assert workers.lifeline_closed("rank 5 n", [5], 11.0) is None
    assert workers.lifeline_closed("keeper 0 n", [5], 12.0) == "n", "the new one has ended, too"


def test_what_was_declared_gone_is_killed_for_as_long_as_it_is_seen_alive(workers: Workers) -> None:
    """Also by a controller that has never decided it: the one that did may have died before the keeper heard."""
    workers.shown("n", [pulse(5, alive=True), pulse(6, alive=True)], {5}.__contains__)
    workers.shown("n", [pulse(5, alive=True)], {5}.__contains__)
    assert workers.keepers["n"].killed == [5, 5]


def test_a_keeper_may_forget_an_end_that_is_on_record(workers: Workers) -> None:
    workers.shown("n", [pulse(5, alive=False)], {5}.__contains__)
    workers.renew(("h", 1), -1)
    assert workers.keepers["n"].known_dead == (), "a controller that comes back would wait for a word about it"
    workers.kill(5, "n")
    workers.shown("n", [pulse(5, alive=False)], {5}.__contains__)
    workers.renew(("h", 1), -1)
    assert workers.keepers["n"].known_dead == (5,)
    workers.shown("n", [], {5}.__contains__)
    workers.renew(("h", 1), -1)
    assert workers.keepers["n"].known_dead == ()


def test_a_rank_whose_node_dies_while_the_head_is_away_is_not_kept(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[object] = []
    monkeypatch.setattr(launch, "create_key", lambda key, value, creator: True)
    monkeypatch.setattr(launch, "start_rank", lambda spec, **_: spec.member)
    monkeypatch.setattr(launch, "end", ended.append)
    monkeypatch.setattr(launch, "if_it_never_begins", lambda process, then: None)
    gone: set[int] = set()
    errands: Any = workers._errands
    errands.held = []
    workers.spawn(7, "n", pytest.fail, gone.__contains__)
    workers.spawn(8, "n", pytest.fail, gone.__contains__)
    gone.add(7)
    errands.go_on()
    assert (ended, workers.ranks) == ([7], {8: 8})


class Starting:
    """A rank that has not answered yet."""

    def __init__(self) -> None:
        self.answer: Future[int] = Future()
        self.process = SimpleNamespace(remote=lambda: SimpleNamespace(future=lambda: self.answer))


@pytest.mark.parametrize(("error", "ends"), [(ActorDiedError(), True), (ActorUnavailableError("", None), False)])
@pytest.mark.parametrize("by", ["this controller", "the one before"])
def test_a_rank_that_ends_before_a_keeper_watches_it_is_known_to_have_ended(
    workers: Workers, monkeypatch: pytest.MonkeyPatch, by: str, error: Exception, ends: bool
) -> None:
    rank, ended = Starting(), list[int]()
    workers._never_began = ended.append
    if by == "this controller":
        monkeypatch.setattr(launch, "create_key", lambda key, value, creator: True)
        monkeypatch.setattr(launch, "start_rank", lambda spec, **_: rank)
        workers.spawn(7, "n", pytest.fail, lambda member: False)
    else:
        monkeypatch.setattr(launch, "names", lambda prefix: [f"{prefix}rank/7"])
        monkeypatch.setattr(launch, "find", lambda name: rank)
        monkeypatch.setattr(launch, "list_keys", lambda prefix: [])
        workers.find()
        workers.taken_up()
    assert workers.ranks == {7: rank} and not ended
    rank.answer.set_exception(error)
    assert ended == [7] * ends


def test_a_keeper_is_ordered_once(workers: Workers) -> None:
    errands: Any = workers._errands
    errands.held = []
    workers.forget_keeper("n")
    workers.start_keeper("n")
    workers.start_keeper("n")
    assert len(errands.held) == 1
    errands.go_on()
    assert "n" in workers.keepers


def test_a_death_that_is_heard_of_while_all_are_ended_changes_nothing(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[str] = []

    def end(handle: str) -> None:
        ended.append(handle)
        workers.ranks.clear()

    monkeypatch.setattr(launch, "end", end)
    workers.ranks.update({1: "rank 1", 2: "rank 2"})
    workers.keepers.clear()
    workers.close().end(linger=True)
    assert ended == ["rank 1", "rank 2"]
