"""A link between two living ranks that carries nothing: found, and gone round."""

from __future__ import annotations

from resilient.core.events import GenerationCreated, LinksProbed, NodeSeen, RankGone, RankReported, Tick
from resilient.core.limits import Limits
from resilient.core.seat import SeatReport
from tests.unit.test_control import Scenario

LIMITS = Limits(min_workers=1, max_workers=2, detection_s=2.0)


def begun() -> Scenario:
    """Rank 1 on node a, rank 2 on node b; there is room on node c."""
    run = Scenario(limits=LIMITS)
    run.take(NodeSeen(node="a", capacity=1))
    run.take(NodeSeen(node="b", capacity=1))
    run.ready(1, "a")
    run.ready(2, "b")
    run.take(GenerationCreated(generation=1))
    run.report(1, 1)
    run.report(2, 1)
    run.take(NodeSeen(node="c", capacity=1))
    return run


def stalls(run: Scenario, generation: int, *members: int, formed: int | None = None) -> list[str]:
    """They say that they wait, and that nothing comes."""
    said = []
    for member in members:
        run.reports += 1
        report = SeatReport(
            member=member,
            serial=run.reports,
            generation=generation,
            formed=generation if formed is None else formed,
            broken=0,
            step=5,
            complete=4,
            finished=False,
            waiting=True,
            stalled=True,
        )
        said += run.take(RankReported(report=report), 0.1)
    return said


def unheard(run: Scenario, generation: int, one: int, other: int) -> list[str]:
    """They say that they can't reach each other."""
    said = run.take(LinksProbed(member=one, generation=generation, unreachable=(other,)))
    return said + run.take(LinksProbed(member=other, generation=generation, unreachable=(one,)))


def test_a_standstill_is_formed_again_and_its_links_are_probed() -> None:
    run = begun()
    assert stalls(run, 1, 1) == []
    assert stalls(run, 1, 2) == ["probe 1", "create 2 unplanned from 1 of (1, 2)"]
    assert run.control.creating is not None
    assert "nothing comes" in run.control.creating.reason


def test_nobody_stands_still_while_one_computes() -> None:
    run = begun()
    run.report(2, 1, step=5, complete=4)
    assert stalls(run, 1, 1) == []
    run.now += 3600.0
    assert run.take(Tick()) == []


def test_a_pair_that_can_t_connect_in_two_generations_loses_the_higher_rank() -> None:
    run = begun()
    stalls(run, 1, 1, 2)
    assert unheard(run, 1, 1, 2) == []
    run.take(GenerationCreated(generation=2))
    assert run.take(Tick()) == []
    assert run.take(Tick(), LIMITS.detection_s) == ["probe 2"]
    assert run.take(LinksProbed(member=1, generation=2, unreachable=(2,))) == [], "it may be stopped"
    assert run.take(LinksProbed(member=2, generation=2, unreachable=(1,))) == [
        "kill 2",
        "create 3 unplanned from 1 of (1,)",
        "spawn 3 on c",
    ]


def test_links_are_probed_again_when_there_has_been_time_for_an_answer() -> None:
    run = begun()
    stalls(run, 1, 1, 2)
    run.take(GenerationCreated(generation=2))
    assert run.take(Tick()) == []
    assert run.take(Tick(), LIMITS.detection_s) == ["probe 2"]
    assert run.take(Tick(), 1.9 * LIMITS.detection_s) == []
    assert run.take(Tick(), 0.2 * LIMITS.detection_s) == ["probe 2"]


def test_a_standstill_that_the_new_connections_end_costs_nobody() -> None:
    run = begun()
    stalls(run, 1, 1, 2)
    unheard(run, 1, 1, 2)
    run.take(GenerationCreated(generation=2))
    run.report(1, 2, step=6, complete=5)
    run.report(2, 2, step=6, complete=5)
    assert unheard(run, 2, 1, 2) == []
    assert run.take(Tick(), 5.0) == []


def test_a_joiner_that_is_not_reached_goes_at_once_and_its_node_waits_longer_each_time() -> None:
    run = Scenario(limits=LIMITS)
    run.take(NodeSeen(node="a", capacity=1))
    run.ready(1, "a")
    run.now += LIMITS.start_together_s
    run.take(Tick())
    run.take(GenerationCreated(generation=1))
    run.report(1, 1)
    run.take(NodeSeen(node="b", capacity=1))
    barred_s, formed = [], 1
    for turn in range(3):
        joiner, generation = 2 + turn, 2 + 3 * turn
        assert run.ready(joiner, "b") == [f"create {generation} planned from {formed} of (1, {joiner})"]
        run.take(GenerationCreated(generation=generation))
        run.report(1, generation, formed=formed)
        stalls(run, generation, 1, joiner, formed=0)
        run.take(GenerationCreated(generation=generation + 1))
        said = unheard(run, generation, 1, joiner)
        assert said[0] == f"kill {joiner}"
        formed = generation + 1
        run.report(1, formed, step=6 + turn, complete=5 + turn)
        began = run.now
        while not (spawned := run.take(Tick(), 1.0)):
            assert run.now - began < 1000.0
        barred_s.append(run.now - began)
        assert spawned == [f"spawn {joiner + 1} on b"]
        run.control.newest = generation + 2
    assert barred_s[0] * 1.9 < barred_s[1] < barred_s[2] / 1.9


def test_what_is_said_of_one_that_has_died_is_forgotten() -> None:
    run = begun()
    stalls(run, 1, 1, 2)
    unheard(run, 1, 1, 2)
    run.take(RankGone(member=2, why="killed"))
    run.take(GenerationCreated(generation=2))
    assert run.take(LinksProbed(member=1, generation=2, unreachable=(2,))) == []
