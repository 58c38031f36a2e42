"""Ranks of different speed: what is measured, when micro-batches are dealt anew, and what becomes of stragglers."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from resilient.core.control import Control
from resilient.core.events import GenerationCreated, NodeSeen, RankReady, RankReported
from resilient.core.instructions import CreateGeneration, Instruction, Kill, Say, Spawn
from resilient.core.limits import Limits
from resilient.core.pace import ENOUGH, REMEMBERED, WARM_UP, Pace
from resilient.core.plan import Address, Plan
from resilient.core.seat import SeatReport

MICRO_BATCHES = 16
STEP_S = 0.5


@dataclass
class Cluster:
    """Ranks that train, one on a node, each of which takes as long for a micro-batch as `leaf_s` says."""

    leaf_s: Callable[[int, float], float]
    ranks: int = 3
    nodes: int = 3
    limits: Limits = field(default_factory=lambda: Limits(min_workers=1, max_workers=3, detection_s=2.0))
    now: float = 0.0
    said: list[str] = field(default_factory=list)
    plans: list[Plan] = field(default_factory=list)
    released: list[int] = field(default_factory=list)
    spawned: dict[int, str] = field(default_factory=dict)
    serial: int = 0

    def __post_init__(self) -> None:
        self.control = Control(limits=self.limits)
        for number in range(self.nodes):
            self.take(NodeSeen(node=f"node{number + 1}", capacity=1))

    def take(self, event: object) -> None:
        for instruction in self.control.handle(event, self.now):  # type: ignore[arg-type]
            self.carry_out(instruction)

    def carry_out(self, instruction: Instruction) -> None:
        match instruction:
            case Say(text=text):
                self.said.append(text)
            case Spawn(member=member, node=node):
                self.spawned[member] = node
            case Kill(member=member):
                self.released.append(member)
            case CreateGeneration(plan=plan):
                self.plans.append(plan)

    def train(self, for_s: float) -> None:
        """A generation forms at once, and a new rank is ready at once."""
        until = self.now + for_s
        while self.now < until:
            for member, node in sorted(self.spawned.items()):
                found = self.control.membership.members[member]
                if found.ready is None and not found.gone:
                    self.take(ready(member, node))
            if self.control.creating is not None:
                self.take(GenerationCreated(generation=self.control.creating.generation))
            current = self.control.current
            assert current is not None
            for member in [number for number in self.spawned if number not in self.released]:
                self.report(member, current)
            self.now += STEP_S

    def report(self, member: int, current: Plan) -> None:
        self.serial += 1
        step = int(self.now / STEP_S)
        report = SeatReport(
            member=member,
            generation=current.generation if member in current.ranks else 1,
            formed=current.generation if member in current.ranks else 1,
            broken=0,
            step=step + 1,
            complete=step,
            finished=False,
            waiting=False,
            at_rest=member not in current.ranks,
            leaf_s=self.leaf_s(member, self.now),
            serial=self.serial,
        )
        self.take(RankReported(report=report))

    @property
    def counts(self) -> list[tuple[int, ...]]:
        """By generation, how many micro-batches each rank has."""
        return [tuple(map(len, plan.leaves)) for plan in self.plans]


def ready(member: int, node: str) -> RankReady:
    at = Address(host="h", port=member)
    return RankReady(
        member=member, node=node, address=at, micro_batches=MICRO_BATCHES, steps=None, probe="p", probe_fields="f"
    )


def test_what_is_measured_is_the_median_of_the_last_ones_without_the_first_and_without_pauses() -> None:
    pace, now = Pace(), 0.0

    def took(seconds: float, *, paused: bool = False) -> None:
        nonlocal now
        pace.handed_out(now)
        now += seconds
        if paused:
            pace.paused()
        pace.folded(now)

    for _ in range(WARM_UP):
        took(50.0)
    for _ in range(ENOUGH - 1):
        took(1.0)
        took(90.0, paused=True)
    assert pace.leaf_s == 0.0, "too few"
    took(30.0)
    assert pace.leaf_s == 1.0
    for _ in range(REMEMBERED):
        took(2.0)
    assert pace.leaf_s == 2.0


def test_micro_batches_follow_speed_after_a_while() -> None:
    cluster = Cluster(lambda member, now: 0.2 if member == 1 else 0.1)
    cluster.train(9.0)
    assert cluster.counts == [(6, 5, 5)]
    cluster.train(4.0)
    assert cluster.counts == [(6, 5, 5), (3, 7, 6)]
    assert (cluster.plans[1].kind, cluster.plans[1].reason[:26]) == ("planned", "micro-batches dealt in pro")
    cluster.train(100.0)
    assert len(cluster.plans) == 2
    assert cluster.control.speeds.relative()[1] == 0.5


@pytest.mark.parametrize("seed", range(5))
def test_noise_moves_nothing(seed: int) -> None:
    rng = random.Random(seed)
    cluster = Cluster(lambda member, now: rng.choice([0.1, 0.1, 0.1, 0.1, 0.3]) * rng.uniform(0.9, 1.1))
    cluster.train(300.0)
    assert cluster.counts == [(6, 5, 5)]


def test_a_rank_that_is_slow_and_fast_in_turns_is_not_followed_to_and_fro() -> None:
    cluster = Cluster(lambda member, now: 0.2 if member == 1 and int(now / 6.0) % 2 else 0.1)
    cluster.train(300.0)
    assert cluster.counts == [(6, 5, 5)]


def test_a_rank_that_becomes_fast_again_gets_its_share_back() -> None:
    cluster = Cluster(lambda member, now: 0.3 if member == 1 and now < 60.0 else 0.1)
    cluster.train(59.0)
    assert cluster.counts == [(6, 5, 5), (2, 7, 7)]
    cluster.train(60.0)
    assert cluster.counts == [(6, 5, 5), (2, 7, 7), (6, 5, 5)]


def test_a_joiner_is_dealt_in_with_the_speeds_that_are_known() -> None:
    cluster = Cluster(lambda member, now: 0.2 if member == 1 else 0.1, nodes=2)
    cluster.train(30.0)
    cluster.take(NodeSeen(node="node3", capacity=1))
    cluster.train(2.0)
    assert cluster.counts[-1] == (3, 7, 6)


def test_a_straggler_is_said_once() -> None:
    cluster = Cluster(lambda member, now: 0.5 if member == 2 else 0.1)
    cluster.train(200.0)
    said = [text for text in cluster.said if "straggler" in text]
    assert said == [
        "rank 1 (node node2) is a straggler: it takes 5.0 times as long for a micro-batch as the median rank; with "
        "evict_stragglers=True it would leave"
    ]
    assert cluster.released == []


def test_a_straggler_leaves_if_the_user_wants_that_and_its_node_is_used_only_if_there_is_no_other() -> None:
    evict = Limits(min_workers=1, max_workers=3, detection_s=2.0, evict_stragglers=True)
    cluster = Cluster(lambda member, now: 0.5 if cluster.spawned[member] == "node2" else 0.1, nodes=4, limits=evict)
    cluster.train(120.0)
    (left,) = cluster.released
    assert cluster.spawned[left] == "node2" and cluster.spawned[4] == "node4"
    assert cluster.plans[-1].members == (1, 3, 4)


def test_where_there_is_no_other_node_one_straggler_leaves_and_the_next_stays() -> None:
    evict = Limits(min_workers=1, max_workers=3, detection_s=2.0, evict_stragglers=True)
    cluster = Cluster(lambda member, now: 0.5 if cluster.spawned[member] == "node2" else 0.1, limits=evict)
    cluster.train(400.0)
    assert len(cluster.released) == 1
    assert len(cluster.plans[-1].members) == 3
    assert any("it stays, since there was no other node" in text for text in cluster.said)


def test_nobody_is_evicted_below_the_minimum() -> None:
    evict = Limits(min_workers=3, max_workers=3, detection_s=2.0, evict_stragglers=True)
    cluster = Cluster(lambda member, now: 0.5 if member == 2 else 0.1, limits=evict)
    cluster.train(200.0)
    assert cluster.released == []
    assert any("it stays, since 3 workers are the least" in text for text in cluster.said)
