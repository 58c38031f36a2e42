"""What happens thousands of times a second must not go through all ranks: walks are counted, not time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from resilient.core.control import Control
from resilient.core.detector import Detector, Vital
from resilient.core.events import (
    Event,
    GenerationCreated,
    NodeSeen,
    RankGone,
    RankReady,
    RankReported,
    RankReturned,
    Tick,
)
from resilient.core.instructions import CreateGeneration, Instruction, Spawn
from resilient.core.limits import Limits
from resilient.core.plan import Address, Plan
from resilient.core.seat import SeatReport

RANKS = 300
PER_NODE = 3
FEW = 10
"""Look-ups of single members that an event may take."""


class Watched(dict[Any, Any]):
    """Counts how often it is gone through, and how often something is looked up."""

    walks = 0
    lookups = 0

    def __iter__(self) -> Iterator[Any]:
        self.walks += 1
        return super().__iter__()

    def keys(self) -> Any:
        self.walks += 1
        return super().keys()

    def values(self) -> Any:
        self.walks += 1
        return super().values()

    def items(self) -> Any:
        self.walks += 1
        return super().items()

    def __getitem__(self, key: Any) -> Any:
        self.lookups += 1
        return super().__getitem__(key)

    def get(self, key: Any, default: Any = None) -> Any:
        self.lookups += 1
        return super().get(key, default)


class Row(tuple[Any, ...]):
    """Fails when it is gone through or searched."""

    __slots__ = ()

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("all ranks of a plan were gone through")

    def __contains__(self, item: object) -> bool:
        raise AssertionError("all ranks of a plan were searched")


class Run:
    """A run of RANKS ranks with one spare."""

    def __init__(self) -> None:
        limits = Limits(min_workers=1, max_workers=RANKS, spares=1, detection_s=2.0)
        self.control = Control(limits=limits)
        self.now, self.serial = 0.0, 0
        self.names = [f"node{number}" for number in range(RANKS // PER_NODE + 1)]
        told = [one for name in self.names for one in self.take(NodeSeen(node=name, capacity=PER_NODE))]
        self.spawned = [one for one in told if isinstance(one, Spawn)]

    def take(self, event: Event) -> tuple[Instruction, ...]:
        self.now += 0.0001  # so little that no look at everybody's speed is due, which is rare
        return self.control.handle(event, self.now)

    def ready(self, spawn: Spawn) -> RankReady:
        return RankReady(
            member=spawn.member,
            node=spawn.node,
            address=Address(host="h", port=spawn.member),
            micro_batches=RANKS,
            steps=3,
            probe="p",
            probe_fields="f",
        )

    def create(self, made: tuple[Instruction, ...]) -> Plan:
        (plan,) = (one.plan for one in made if isinstance(one, CreateGeneration))
        self.take(GenerationCreated(generation=plan.generation))
        return plan

    def report(self, member: int, **facts: Any) -> RankReported:
        self.serial += 1
        known = {
            "generation": 1,
            "formed": 1,
            "broken": 0,
            "step": 5,
            "complete": 4,
            "finished": False,
            "waiting": False,
        }
        return RankReported(report=SeatReport(member=member, serial=self.serial, **{**known, **facts}))

    def without_a_walk(self, event: Event) -> tuple[Instruction, ...]:
        members = self.control.membership.members = Watched(self.control.membership.members)
        if self.control.current is not None:
            for name in ("members", "places", "leaves"):
                object.__setattr__(self.control.current, name, Row(tuple.__iter__(getattr(self.control.current, name))))
        told = self.take(event)
        assert members.walks == 0 and members.lookups <= FEW, (event, members.walks, members.lookups)
        return told


@pytest.fixture
def run() -> Run:
    """Its first generation has been created."""
    run = Run()
    run.create(tuple(one for spawn in run.spawned for one in run.take(run.ready(spawn))))
    return run


def test_ranks_that_become_ready_go_through_nobody() -> None:
    run = Run()
    for spawn in run.spawned[:2]:  # whom the others are compared with is looked for once
        run.take(run.ready(spawn))
    for spawn in run.spawned[2 : RANKS - 1]:
        run.without_a_walk(run.ready(spawn))


def test_reports_and_ticks_go_through_nobody(run: Run) -> None:
    run.without_a_walk(run.report(1, formed=0))
    for member in range(1, RANKS + 1):
        run.without_a_walk(run.report(member))
    run.without_a_walk(Tick())
    run.without_a_walk(run.report(7, waiting=True))
    run.without_a_walk(run.report(8, step=6, complete=5))
    run.without_a_walk(run.report(9, broken=1))
    run.without_a_walk(run.report(10, broken=1))
    run.without_a_walk(NodeSeen(node=run.names[0], capacity=PER_NODE))


def test_the_end_of_a_run_goes_through_nobody(run: Run) -> None:
    for member in range(1, RANKS + 1):
        run.take(run.report(member))
    for member in range(1, RANKS + 1):
        run.without_a_walk(run.report(member, finished=True))
        run.without_a_walk(RankReturned(member=member, step=5, digest="d"))
    assert run.control.ended


def test_reports_after_a_death_go_through_nobody(run: Run) -> None:
    for member in range(1, RANKS + 1):
        run.take(run.report(member))
    run.create(run.take(RankGone(member=5, why="killed")))
    for member in range(6, RANKS + 1):
        run.without_a_walk(run.report(member, broken=1))
        run.without_a_walk(run.report(member, generation=2))
    assert run.control.formed is not run.control.current


def test_a_heartbeat_and_a_look_go_through_no_other_nodes_ranks() -> None:
    detector = Detector(detection_s=2.0)

    def beat(node: int, now: float) -> None:
        shown = tuple(
            Vital(
                member=node * 2 + rank,
                alive=True,
                stopped=False,
                activity="computing",
                work=int(now * 10),
                longest_s=1.0,
            )
            for rank in range(2)
        )
        assert detector.beat(f"node{node}", shown, now) == ()

    for node in range(100):
        beat(node, 1.0)
    nodes, ranks = Watched(detector.nodes), Watched(detector.ranks)
    detector.nodes, detector.ranks = nodes, ranks
    for turn in range(1, 10):
        now = 1.0 + turn / 5
        beat(turn, now)
        assert detector.verdicts(now) == ()
    assert nodes.walks == 0 and ranks.walks == 0 and ranks.lookups <= 9 * 2
