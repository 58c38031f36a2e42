"""What a pipeline's throughput is after it has lost ranks, beside what others make of the ranks that are left.

    python -m benchmarks.pipeline            writes out/bench/pipeline.json

Two cores can't show eight ranks that compute at the same time. So a layer's time is waited for, not computed, by a
calibrated time; all else is real: processes, messages, exchange, snapshots, kills. What real computing takes is
measured once more, on two ranks, beside one. Each rank has a node of its own, and is lost with it. Compared are

    ours              layers and micro-batches are dealt anew to the ranks that are left
    rerouted          micro-batches go to ranks of the same stage, layers stay (as in ReCycle, SOSP 2024): a limit on
                      what a rank may hold keeps ours from moving layers
    replica dropped   the ranks of the replica that has lost one stand idle: a run with so many ranks less

and all with the best that any split of layers over the ranks left could reach, computed (pipeline_model.py). A rank
has memory for half as many layers more than it has at first: without any to spare none could move, and without a limit
there need be no stages. Of two lost ranks none are of the same stage, since rerouting could not do with a stage's last
one, and both of the same replica, since dropping replicas could not do with both lost: both others are taken at their
best. How it goes on with more ranks is simulated.
"""

from __future__ import annotations

import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from rich.progress import Progress

from benchmarks import ray_nodes
from benchmarks.outcome import Target, write
from benchmarks.pipeline_model import Split, best_s, bound_s, planned, simulated_s
from benchmarks.pipeline_run import LAYER, LAYER_BYTES, LAYERS, MICRO_BATCHES, Running, body, real
from resilient.core.chain import Costs, Rank
from resilient.core.partition import partition
from resilient.core.staging import LONGER

OUT = Path("out/bench/pipeline.json")
BEFORE, STEPS = 2, 4
"""Steps that are measured before a loss, and after."""
MORE_LAYERS = 1.5
"""A rank has memory for so many times the layers that it has while no rank is lost."""
PLANNER_RANKS, PLANNER_LAYERS, PLANNER_STAGES = 10_000, 200, 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    ranks: int
    stages: int
    lost: int

    @property
    def name(self) -> str:
        return f"{self.lost} of {self.ranks} ranks lost"

    @property
    def most(self) -> int:
        """Layers for which a rank has memory: then ours may also choose fewer stages."""
        return int(MORE_LAYERS * LAYERS / self.stages)


CASES = (Case(ranks=4, stages=2, lost=1), Case(ranks=8, stages=4, lost=1), Case(ranks=8, stages=4, lost=2))


@dataclass(frozen=True, slots=True, kw_only=True)
class Larger:
    """Of as many ranks in each stage, some are lost in the same one."""

    layers: int
    stages: int
    replicas: int
    lost: int
    micro_batches: int


LARGER = (
    Larger(layers=32, stages=8, replicas=8, lost=1, micro_batches=512),
    Larger(layers=32, stages=8, replicas=8, lost=3, micro_batches=512),
    Larger(layers=64, stages=16, replicas=16, lost=1, micro_batches=2048),
    Larger(layers=64, stages=16, replicas=16, lost=4, micro_batches=2048),
)


# Measured


def after_a_loss(folder: Path, case: Case, add_nodes: Callable[[int], None]) -> dict[str, Any]:
    """Ours; and then the lost nodes are replaced, so that layers move once more."""
    left = case.ranks - case.lost
    rank_bytes = case.most * LAYER_BYTES
    running = Running(folder, body, case.ranks, left, stages=case.stages, rank_bytes=rank_bytes)
    try:
        before, split_before = running.steps_of(case.ranks, BEFORE), running.split()
        generation = running.generation_of(case.ranks)
        running.lose(victims(running, case.lost))
        after, split = running.steps_of(left, STEPS), running.split()
        lost_pause = running.pause_steps(generation)
        generation = running.generation_of(left)
        add_nodes(case.lost)
        again = running.steps_of(case.ranks, BEFORE)
        return {
            "before_s": before,
            "before": [split_before.layers, split_before.ranks],
            "after_s": after,
            "after": [split.layers, split.ranks],
            "simulated_s": simulated_s(split, MICRO_BATCHES, LAYER),
            "bound_s": bound_s(split, MICRO_BATCHES, LAYER),
            "replaced_s": again,
            "pauses_steps": {"after the loss": lost_pause, "ranks joined": running.pause_steps(generation)},
            "recoveries": running.recoveries(),
        }
    finally:
        running.stop()


def victims(running: Running, lost: int) -> list[int]:
    """One of each of the last stages that have more than one rank."""
    return [stage[-1][0] for stage in running.stages() if len(stage) > 1][-lost:]


def rerouted(folder: Path, case: Case, add_nodes: Callable[[int], None]) -> dict[str, Any]:
    """A rank may hold no more layers than it does."""
    left, rank_bytes = case.ranks - case.lost, LAYERS // case.stages * LAYER_BYTES
    running = Running(folder, body, case.ranks, left, stages=case.stages, rank_bytes=rank_bytes)
    try:
        running.generation_of(case.ranks)
        running.lose(victims(running, case.lost))
        after, split = running.steps_of(left, STEPS), running.split()
        add_nodes(case.lost)
        assert set(split.layers) == {LAYERS // case.stages}, split
        return {"after_s": after, "after": [split.layers, split.ranks]}
    finally:
        running.stop()


@functools.cache
def with_fewer(folder: Path, ranks: int, stages: int) -> dict[str, Any]:
    """A replica is dropped: what is left is a smaller run, in even stages."""
    rank_bytes = LAYERS // stages * LAYER_BYTES
    running = Running(folder, body, ranks, ranks, stages=stages, rank_bytes=rank_bytes)
    try:
        return {"after_s": running.steps_of(ranks, STEPS)}
    finally:
        running.stop()


def real_computing(folder: Path) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for ranks in (1, 2):
        running = Running(folder, real, ranks, ranks, stages=ranks)
        try:
            found[f"{ranks} ranks"] = running.steps_of(ranks, STEPS)
        finally:
            running.stop()
    return found


# Computed


def larger(case: Larger) -> dict[str, Any]:
    """By simulation; ours is planned from nothing."""
    ranks, per_stage = case.stages * case.replicas, case.layers // case.stages
    layers = (per_stage,) * case.stages
    plan = functools.partial(
        planned,
        case.layers,
        ranks - case.lost,
        case.stages,
        case.micro_batches,
        LAYER,
        most=int(MORE_LAYERS * per_stage),
    )
    split, least = plan(slack=LONGER), plan()
    in_one = (*(case.replicas,) * (case.stages - 1), case.replicas - case.lost)
    dropped = (case.replicas - 1,) * case.stages
    return {
        "ours": [split.layers, split.ranks],
        "ours_s": simulated_s(split, case.micro_batches, LAYER),
        "best_s": bound_s(least, case.micro_batches, LAYER),
        "rerouted_s": simulated_s(Split(layers, in_one), case.micro_batches, LAYER),
        "dropped_s": simulated_s(Split(layers, dropped), case.micro_batches, LAYER),
    }


def planning_s() -> float:
    """CPU time: stages for many ranks, eight of which have gone."""
    costs = Costs(
        layer_s=tuple((0.01, 0.012, 0.02, 0.05)[layer * layer % 7 % 4] for layer in range(PLANNER_LAYERS)),
        layer_bytes=(100_000_000,) * PLANNER_LAYERS,
    )
    asked = {"stages": PLANNER_STAGES, "micro_batches": PLANNER_RANKS}
    held: dict[int, tuple[int, int]] = {}
    for stage in partition(costs, [Rank()] * PLANNER_RANKS, **asked).stages:
        held |= dict.fromkeys(stage.ranks, (stage.first, stage.stop))
    left = [Rank(holds=held[rank]) for rank in range(PLANNER_RANKS - 8)]
    began = time.process_time()
    partition(costs, left, slack=LONGER, **asked)
    return time.process_time() - began


def main() -> None:
    targets: list[Target] = []
    samples: dict[str, Any] = {"layer_s": [LAYER.forward_s, LAYER.backward_s], "layers": LAYERS}
    samples["micro_batches"] = MICRO_BATCHES
    cluster = ray_nodes.start(CASES[0].ranks)

    def add_nodes(count: int) -> None:
        for _ in range(count):
            ray_nodes.add_place(cluster)

    try:
        with tempfile.TemporaryDirectory() as name, Progress() as progress:
            folder = Path(name)
            samples["real computing"] = computed = real_computing(folder)
            nodes = CASES[0].ranks
            for case in progress.track(CASES, description="losing ranks"):
                add_nodes(case.ranks - nodes)  # with more nodes than ranks a loss would be made up for at once
                nodes = case.ranks
                samples[case.name] = found = {
                    "ours": after_a_loss(folder, case, add_nodes),
                    "rerouted": rerouted(folder, case, add_nodes),
                    "replica dropped": with_fewer(folder, case.ranks - case.stages, case.stages),
                }
                targets += _targets(case, found)
                progress.console.print(case.name, found)
    finally:
        ray.shutdown()
        cluster.shutdown()
    one, two = (statistics.median(computed[f"{ranks} ranks"]) for ranks in (1, 2))
    targets.append(Target(name="real computing: 2 stages / 1 rank, step time", value=two / one, unit="x", goal=1.0))
    samples["simulated"] = {str(case): larger(case) for case in LARGER}
    targets.append(
        Target(name="planner, 10,000 ranks, 200 layers", value=planning_s(), unit="s", goal=1.0),
    )
    write(OUT, targets, samples)


def _targets(case: Case, found: dict[str, Any]) -> list[Target]:
    ours, others, dropped = (statistics.median(found[kind]["after_s"]) for kind in found)
    left = case.ranks - case.lost
    best = best_s(LAYERS, left, range(1, case.stages + 1), MICRO_BATCHES, LAYER, case.most)
    target = functools.partial(Target, unit="x", at_least=True)
    return [
        target(name=f"{case.name}: best possible / ours", value=best / ours, goal=0.95),
        target(name=f"{case.name}: replica dropped / ours", value=dropped / ours, goal=1.3),
        target(name=f"{case.name}: rerouted / ours", value=others / ours, goal=1.3),
        target(name=f"{case.name}: simulated / measured", value=found["ours"]["simulated_s"] / ours, goal=0.9),
        *(
            Target(name=f"{case.name}: pause, {what}", value=pause, unit="steps", goal=1.0)
            for what, pause in found["ours"]["pauses_steps"].items()
        ),
    ]


if __name__ == "__main__":
    main()
