"""What one event costs the controller's core, from 16 nodes to 10,000. No Ray and no processes: the core alone.

python -m benchmarks.scale [NODES...]        writes out/bench/scale.json

A run of n ranks, one or eight on a node, with as many micro-batches, is brought to its first generation event by event
as the controller would, and then measured; CPU time of this process, medians over several rounds. A death counts from
the verdict until the new plan is on its way to the last rank. What has no target is in the samples only.
"""

from __future__ import annotations

import gc
import pickle
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.outcome import Target, write
from resilient.core.chain import Costs, Rank
from resilient.core.control import Control
from resilient.core.detector import Detector, Vital
from resilient.core.events import (
    Event,
    GenerationCreated,
    NodeGone,
    NodeSeen,
    RankGone,
    RankReady,
    RankReported,
    Tick,
)
from resilient.core.instructions import CreateGeneration, Instruction, Spawn
from resilient.core.partition import Partition, partition
from resilient.core.plan import Address, Plan
from resilient.core.recovery import Limits
from resilient.core.seat import SeatReport
from resilient.core.staging import LONGER
from resilient.core.tree import owned
from snapshot.core.stripes import groups

OUT = Path("out/bench/scale.json")
NODES = (16, 100, 1_000, 10_000)
RANKS_PER_NODE = (1, 8)
DEATHS = 5
FEW = 2_000
"""Reports, heartbeats and ticks are measured so many at a time."""
ROUNDS = 5
DETECTION_S = 2.0
LOOK_EVERY_S = 0.05
GOALS_MS = {"a rank's death": 50.0, "a node's death": 50.0, "a full re-plan": 1000.0}
SMALL = ("a report", "a report that a generation has formed", "a heartbeat", "a tick", "a look for the dead")
SMALL_GOAL_MS = 0.1
LAYERS = 200
STAGES = 32
STAGES_GOAL_MS = 1000.0
Samples = dict[str, list[float]]


def main() -> None:
    sizes = [int(size) for size in sys.argv[1:]] or list(NODES)
    samples = {f"{nodes} x {ranks}": Cluster(nodes, ranks).measured() for ranks in RANKS_PER_NODE for nodes in sizes}
    pipelines = {f"{size} ranks, {LAYERS} layers, {STAGES} stages": Pipeline(size).measured() for size in sizes}
    found = targets(samples) + [
        Target(name=f"{size}: {what}", value=statistics.median(times), unit="ms", goal=STAGES_GOAL_MS)
        for size, pipeline in pipelines.items()
        for what, times in pipeline.items()
    ]
    write(OUT, found, {"unit": "ms", **samples, **pipelines})


def targets(samples: dict[str, Samples]) -> list[Target]:
    goals = {**GOALS_MS, **dict.fromkeys(SMALL, SMALL_GOAL_MS)}
    return [
        Target(name=f"{size}: {what}", value=statistics.median(times), unit="ms", goal=goals[what])
        for size, found in samples.items()
        for what, times in found.items()
        if what in goals
    ]


class Pipeline:
    """Layers and ranks made into stages, as many micro-batches as ranks, with steps allowed to be a little longer."""

    def __init__(self, ranks: int) -> None:
        layer_s = tuple((0.01, 0.012, 0.02, 0.05)[layer * layer % 7 % 4] for layer in range(LAYERS))
        layer_bytes = tuple(100_000_000 * (1 + layer % 3) for layer in range(LAYERS))
        self.costs, self.size = Costs(layer_s=layer_s, layer_bytes=layer_bytes), ranks
        self.found: Samples = {}

    def measured(self) -> Samples:
        for _ in range(ROUNDS):
            ranks = self._held([Rank()] * self.size)
            lost = self.size // 3
            self._stages("stages, a node of 8 lost", ranks[:lost] + ranks[lost + 8 :])
            self._stages("stages, the first one lost", [rank for rank in ranks if rank.holds != ranks[0].holds])
            self._stages("stages, 3 slow ranks", self._slower(ranks, 3))
            self._stages("stages, all speeds", [replace(r, speed=0.5 + at % 101 / 100) for at, r in enumerate(ranks)])
        return self.found

    def _held(self, ranks: list[Rank]) -> list[Rank]:
        for stage in self._stages("stages, from nothing", ranks).stages:
            for rank in stage.ranks:
                ranks[rank] = replace(ranks[rank], holds=(stage.first, stage.stop))
        return ranks

    def _slower(self, ranks: list[Rank], count: int) -> list[Rank]:
        return [replace(rank, speed=0.7) if at < count else rank for at, rank in enumerate(ranks)]

    def _stages(self, what: str, ranks: list[Rank]) -> Partition:
        began = time.process_time_ns()
        found = partition(self.costs, ranks, stages=STAGES, micro_batches=self.size, slack=LONGER)
        self.found.setdefault(what, []).append((time.process_time_ns() - began) / 1e6)
        return found


class Cluster:
    """A run under the controller's core, with whatever a shell would answer at once."""

    def __init__(self, nodes: int, ranks_per_node: int) -> None:
        self.names = [f"{number:056x}" for number in range(nodes)]
        self.per_node, self.size = ranks_per_node, nodes * ranks_per_node
        limits = Limits(min_workers=2, max_workers=self.size, detection_s=DETECTION_S)
        self.control = Control(limits=limits)
        self.detector = Detector(detection_s=DETECTION_S)
        self.now, self.serial, self.step = 0.0, 0, 0
        self.found: Samples = {}

    def measured(self) -> Samples:
        gc.collect()
        self._begin()
        self._small_events()
        self._detect()
        for _ in range(DEATHS):
            self._lose_a_rank()
        for _ in range(DEATHS):
            self._lose_a_node()
        self._plans()
        return self.found

    # Life

    def handle(self, event: Event) -> tuple[Instruction, ...]:
        self.now += 1e-6
        return self.control.handle(event, self.now)

    @property
    def current(self) -> Plan:
        assert self.control.current is not None
        return self.control.current

    def report(self, member: int, **others: Any) -> RankReported:
        self.serial += 1
        facts: dict[str, Any] = {"formed": self.current.generation, "broken": 0, "waiting": False, **others}
        generation, complete = self.current.generation, self.step - 1
        return RankReported(
            report=SeatReport(
                serial=self.serial,
                member=member,
                generation=generation,
                step=self.step,
                complete=complete,
                finished=False,
                **facts,
            )
        )

    def ready(self, member: int, node: str) -> RankReady:
        return RankReady(
            member=member,
            node=node,
            address=Address(
                host=f"10.{member >> 16 & 255}.{member >> 8 & 255}.{member & 255}", port=40_000 + member % 9
            ),
            micro_batches=self.size,
            steps=None,
            probe="p",
            probe_fields="f",
        )

    def _begin(self) -> None:
        """From nothing to a generation that everybody has reported formed."""
        spawned: list[Spawn] = []
        for name in self.names:
            spawned += _spawns(self.timed("a node that comes", NodeSeen(node=name, capacity=self.per_node)))
        made: tuple[Instruction, ...] = ()
        for spawn in spawned:
            event = self.ready(spawn.member, spawn.node)
            made = self.timed("a rank that is ready", event) if spawn is not spawned[-1] else self.handle(event)
        self._created(made)
        for member in self.current.members:
            self.timed("a report that a generation has formed", self.report(member))

    def _created(self, made: tuple[Instruction, ...]) -> None:
        (plan,) = (instruction.plan for instruction in made if isinstance(instruction, CreateGeneration))
        self.handle(GenerationCreated(generation=plan.generation))

    def _small_events(self) -> None:
        for member in (self.current.members * (FEW // self.size + 1))[:FEW]:
            self.step += 1
            self.timed("a report", self.report(member, waiting=self.step % 2 == 0))
            self.timed("a tick", Tick())

    def timed(self, what: str, event: Event) -> tuple[Instruction, ...]:
        return self.clocked(what, lambda: self.handle(event))

    def clocked(self, what: str, run: Callable[[], Any]) -> Any:
        began = time.process_time_ns()
        result = run()
        self.found.setdefault(what, []).append((time.process_time_ns() - began) / 1e6)
        return result

    # Detection

    def _detect(self) -> None:
        """Beats of all nodes for a few detection times, with the controller looking every 50 ms."""
        vitals = {
            name: tuple(
                Vital(
                    member=index * self.per_node + rank,
                    alive=True,
                    stopped=False,
                    activity="computing",
                    work=5,
                    longest_s=1,
                )
                for rank in range(self.per_node)
            )
            for index, name in enumerate(self.names)
        }
        slices = 5  # of the 250 ms from one beat of a node to its next
        for turn in range(int((ROUNDS + 1) * DETECTION_S / LOOK_EVERY_S)):
            now = 1000.0 + turn * LOOK_EVERY_S
            for name in self.names[turn % slices :: slices]:
                vitals[name] = tuple(replace(vital, work=vital.work + 1) for vital in vitals[name])
                self.clocked("a heartbeat", lambda name=name, now=now: self.detector.beat(name, vitals[name], now))  # type: ignore[misc]
            assert not self.clocked("a look for the dead", lambda now=now: self.detector.verdicts(now))  # type: ignore[misc]
        looks = self.found["a look for the dead"]
        per_round = int(DETECTION_S / LOOK_EVERY_S)  # in which every node is looked at once
        self.found["a look for the dead"] = [
            statistics.mean(looks[at : at + per_round]) for at in range(0, len(looks), per_round)
        ][1:]

    # Deaths

    def _lose_a_rank(self) -> None:
        victim = self.current.members[self.current.size // 2]
        self._recover("a rank's death", RankGone(member=victim, why="killed"))

    def _lose_a_node(self) -> None:
        node = self.current.places[self.current.size // 3].node
        self._recover("a node's death", NodeGone(node=node, why="silent"))
        self.handle(NodeSeen(node=f"{self.serial:056x}", capacity=self.per_node))

    def _recover(self, what: str, loss: Event) -> None:
        """The loss, its generation, the replacements, and the planned generation that takes them in."""
        began = time.process_time_ns()
        made = self.handle(loss)
        decided = time.process_time_ns()
        self._created(made)
        self.found.setdefault(what, []).append((time.process_time_ns() - began) / 1e6)
        self.found.setdefault(f"{what}: until it is decided", []).append((decided - began) / 1e6)
        for member in self.current.members:
            self.handle(self.report(member))
        for spawn in _spawns(made):
            made = self.handle(self.ready(spawn.member, spawn.node))
            if any(isinstance(one, CreateGeneration) for one in made):
                self._created(made)
                for member in self.current.members:
                    self.handle(self.report(member))

    # Plans

    def _plans(self) -> None:
        """What is made of a plan: the plan itself, its text, the keepers' groups, and the tree over its leaves."""
        for _ in range(ROUNDS):
            self._replan()
            plan = self.current
            text = self.clocked("a plan to JSON", plan.to_json)
            self.clocked("a plan from JSON", lambda text=text: Plan.from_json(text))  # type: ignore[misc]
            self.clocked("roots and folds of all ranks", lambda plan=plan: owned(plan.owners()))  # type: ignore[misc]
        self.found["a plan's JSON, MB"] = [len(text) / 1e6]
        self.found["a plan between processes, MB"] = [len(pickle.dumps(plan, 5)) / 1e6]

    def _replan(self) -> None:
        """A rank is lost and replaced: all micro-batches are dealt anew, and keepers grouped anew."""
        made = self.handle(RankGone(member=self.current.members[-1], why="killed"))
        self._created(made)
        for member in self.current.members:
            self.handle(self.report(member))
        (spawn,) = _spawns(made)
        event = self.ready(spawn.member, spawn.node)

        def run() -> None:
            self._created(self.handle(event))
            groups([(node, node) for node in sorted({place.node for place in self.current.places})], 2)

        self.clocked("a full re-plan", run)
        assert self.current.kind == "planned"
        for member in self.current.members:
            self.handle(self.report(member))


def _spawns(instructions: tuple[Instruction, ...]) -> list[Spawn]:
    return [instruction for instruction in instructions if isinstance(instruction, Spawn)]


if __name__ == "__main__":
    main()
