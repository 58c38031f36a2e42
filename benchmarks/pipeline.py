"""What a pipeline's throughput is after it has lost ranks, beside what others make of the ranks that are left.

    python -m benchmarks.pipeline            writes out/bench/pipeline.json

Two cores can't show eight ranks that compute at the same time. So a layer's time is waited for, not computed, by a
calibrated time; all else is real: processes, messages, exchange, snapshots, kills. What real computing takes is
measured once more at the end, on two ranks, beside one. Compared are

    ours              layers and micro-batches are dealt anew to the ranks that are left
    rerouted          micro-batches go to ranks of the same stage, layers stay (as in ReCycle, SOSP 2024): a limit on
                      what a rank may hold keeps ours from moving layers
    replica dropped   the ranks of the replica that has lost one stand idle: a run with so many ranks less

and all with the best that any split of layers over the ranks left could reach, computed (pipeline_model.py).
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import ray
import torch
from rich.progress import Progress
from torch import Tensor, nn

import resilient
from actors import launch
from benchmarks import ray_nodes
from benchmarks.outcome import Target, write
from benchmarks.pipeline_model import Layer, Split, best_s, simulated_s, widths
from resilient.demo_model import SourceText
from resilient.demo_pipeline_model import LAYERS as BLOCKS
from resilient.demo_pipeline_model import Block, Embedding, Head, loss_of

OUT = Path("out/bench/pipeline.json")
NAME = "bench-pipeline"
LAYERS, MICRO_BATCHES = 16, 16
LAYER = Layer(forward_s=0.005, backward_s=0.010)
WIDTH = 64
STEPS = 12
"""Measured before, and after."""
WARM_UP = 3
LIMIT_S = 240.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    ranks: int
    stages: int
    lost: int

    @property
    def name(self) -> str:
        return f"{self.lost} of {self.ranks} ranks lost"

    @property
    def replica(self) -> int:
        """How many ranks a whole replica of the model has."""
        return self.stages


CASES = (Case(ranks=4, stages=2, lost=1), Case(ranks=8, stages=4, lost=1), Case(ranks=8, stages=4, lost=2))


class Wait(torch.autograd.Function):
    """The identity, which takes its time both ways."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        time.sleep(LAYER.forward_s)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        time.sleep(LAYER.backward_s)
        return gradient.clone()


class Waiting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = Wait.apply(x * self.weight)  # type: ignore[no-untyped-call]
        return found


class Points(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    def __len__(self) -> int:
        return 1 << 20

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.full((WIDTH,), index / len(self), requires_grad=False), torch.zeros(WIDTH)


def mean_square(out: Tensor, target: Tensor) -> Tensor:
    return nn.functional.mse_loss(out, target)


def body(run: resilient.Run, trace: str, stages: int, rank_bytes: int | None) -> None:
    """Trains until it is stopped; rank 0 writes down when each step was committed."""
    pipe = run.pipeline([Waiting] * LAYERS, mean_square, stages=stages, rank_bytes=rank_bytes)
    _train(run, pipe, Points(), MICRO_BATCHES, 1, trace)


def real(run: resilient.Run, trace: str, stages: int) -> None:
    tied = {f"layers.{BLOCKS + 1}.words.weight": "layers.0.words.weight"}
    pipe = run.pipeline([Embedding, *[Block] * BLOCKS, Head], loss_of, stages=stages, tied=tied)
    _train(run, pipe, SourceText(), 32, 4, trace)


def _train(run: resilient.Run, pipe: Any, dataset: Any, global_batch: int, micro_batch: int, trace: str) -> None:
    optimizer = torch.optim.SGD(pipe.parameters(), 1e-3)
    run.protect(model=pipe, optimizer=optimizer)
    with open(trace, "a", buffering=1) as lines:
        for step in run.steps(dataset, global_batch=global_batch, micro_batch=micro_batch, steps=1_000_000):
            pipe.train_step(step)
            optimizer.step()
            optimizer.zero_grad()
            if run.is_main:
                row = {"at": time.monotonic(), "step": run.step, "generation": run.generation, "ranks": run.world_size}
                lines.write(json.dumps(row) + "\n")


class Running:
    """A run in a thread, on a cluster with room for so many ranks and no more."""

    def __init__(self, folder: Path, function: Any, ranks: int, least: int, **arguments: Any) -> None:
        self._trace = folder / f"{time.monotonic_ns()}.jsonl"
        train = resilient.train(
            name=NAME,
            workers=(least, ranks),
            resources={"CPU": 1, "place": 1},
            snapshot=resilient.Snapshot(every=1, linger_s=0.0),
        )(function)
        watched = functools.partial(train.watched, lambda news: None, trace=str(self._trace), **arguments)
        self._thread = threading.Thread(target=self._run, args=(watched,), daemon=True)
        self._thread.start()

    def _run(self, watched: Any) -> None:
        with contextlib.suppress(resilient.ResilientError):  # it is stopped
            watched()

    def rows(self) -> list[dict[str, Any]]:
        if not self._trace.exists():
            return []
        lines = self._trace.read_text().splitlines()
        return sorted((json.loads(line) for line in lines if line.endswith("}")), key=lambda row: row["at"])

    def steps_of(self, ranks: int) -> list[float]:
        """The duration of each of STEPS steps in the newest generation, which has so many ranks."""

        def taken() -> list[float]:
            rows = self.rows()
            if not rows or rows[-1]["ranks"] != ranks:
                return []
            own = [row["at"] for row in rows if row["generation"] == rows[-1]["generation"]]
            return [after - before for before, after in pairwise(own)][WARM_UP:]

        _until(lambda: len(taken()) >= STEPS, f"{STEPS} steps of {ranks} ranks")
        return taken()[:STEPS]

    @property
    def controller(self) -> Any:
        (name,) = (name for name in launch.names(f"{NAME}/") if name.endswith("/controller"))
        return launch.find(name)

    def stages(self) -> list[list[tuple[int, str]]]:
        """Member and node of each rank, by stage."""
        seen = ray.get(self.controller.processes.remote())
        return [[seen["ranks"][rank] for rank in ranks] for ranks in seen["stages"]]

    def split(self) -> Split:
        seats = ray.get(self.controller.look.remote())["ranks"]
        stages = sorted({tuple(seat["layers"]) for seat in seats})
        return widths([(first, stop, sum(seat["layers"] == [first, stop] for seat in seats)) for first, stop in stages])

    def kill(self, members: list[int]) -> None:
        for member in members:
            (name,) = (name for name in launch.names(f"{NAME}/") if name.endswith(f"/rank/{member}"))
            os.kill(ray.get(launch.find(name).process.remote()), signal.SIGKILL)

    def stop(self) -> None:
        self.controller.stop.remote("it has been measured")
        self._thread.join(LIMIT_S)


@ray.remote(num_cpus=0, resources={"place": 1})
class Blocker:
    """Takes the place of a rank that was killed, so that no other is started there."""


@contextlib.contextmanager
def places_taken(count: int) -> Iterator[None]:
    blockers = [Blocker.remote() for _ in range(count)]  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for blocker in blockers:
            ray.kill(blocker)


def _until(holds: Any, what: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not holds():
        assert time.monotonic() < deadline, f"not within {LIMIT_S} s: {what}"
        time.sleep(0.1)


def after_a_loss(folder: Path, case: Case, *, layers_stay: bool) -> dict[str, Any]:
    per_stage = LAYERS // case.stages
    rank_bytes = per_stage * WIDTH * 4 if layers_stay else None
    left = case.ranks - case.lost
    running = Running(folder, body, case.ranks, left, stages=case.stages, rank_bytes=rank_bytes)
    try:
        before = running.steps_of(case.ranks)
        victims = [stage[-1][0] for stage in running.stages() if len(stage) > 1][: case.lost]
        with places_taken(case.lost):
            killed_at = time.monotonic()
            running.kill(victims)
            after, split = running.steps_of(left), running.split()
            return {
                "before_s": before,
                "after_s": after,
                "layers": split.layers,
                "ranks": split.ranks,
                "simulated_s": simulated_s(split, MICRO_BATCHES, LAYER),
                "pause_steps": _pause(running.rows(), killed_at, statistics.median(after)),
            }
    finally:
        running.stop()


def _pause(rows: list[dict[str, Any]], since: float, step_s: float) -> float:
    """Of the planned changes after the kill: the longest time between two commits, in steps, beyond one."""
    later = [row for row in rows if row["at"] > since]
    gaps = [
        after["at"] - before["at"] for before, after in pairwise(later) if after["generation"] > before["generation"]
    ]
    return max(gaps, default=step_s) / step_s - 1


def with_fewer(folder: Path, case: Case) -> list[float]:
    """A replica is dropped: what is left is a smaller run."""
    ranks = case.ranks - case.replica
    running = Running(folder, body, ranks, ranks, stages=case.stages, rank_bytes=None)
    try:
        return running.steps_of(ranks)
    finally:
        running.stop()


def real_computing(folder: Path) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for ranks in (1, 2, 1, 2):
        running = Running(folder, real, ranks, ranks, stages=ranks)
        try:
            found.setdefault(f"{ranks} ranks", []).extend(running.steps_of(ranks))
        finally:
            running.stop()
    return found


def main() -> None:
    targets: list[Target] = []
    samples: dict[str, Any] = {"layer_s": [LAYER.forward_s, LAYER.backward_s], "layers": LAYERS}
    cluster = ray_nodes.start(0)
    ray_nodes.add(cluster, num_cpus=16, object_store_memory=80 << 20, resources={"place": max(c.ranks for c in CASES)})
    try:
        with tempfile.TemporaryDirectory() as folder, Progress() as progress:
            for case in progress.track(CASES, description="losing ranks"):
                samples[case.name] = found = {
                    "ours": after_a_loss(Path(folder), case, layers_stay=False),
                    "rerouted": after_a_loss(Path(folder), case, layers_stay=True),
                    "replica dropped": {"after_s": with_fewer(Path(folder), case)},
                }
                targets += _targets(case, found)
            samples["real computing"] = computed = real_computing(Path(folder))
    finally:
        ray.shutdown()
        cluster.shutdown()
    one, two = (statistics.median(computed[f"{ranks} ranks"]) for ranks in (1, 2))
    targets.append(Target(name="real computing: 2 stages / 1 rank, step time", value=two / one, unit="x", goal=1.0))
    write(OUT, targets, samples)


def _targets(case: Case, found: dict[str, Any]) -> list[Target]:
    ours, rerouted, dropped = (statistics.median(found[kind]["after_s"]) for kind in found)
    best = best_s(LAYERS, case.ranks - case.lost, case.stages, MICRO_BATCHES, LAYER)
    target = functools.partial(Target, unit="x", at_least=True)
    return [
        target(name=f"{case.name}: best possible / ours", value=best / ours, goal=0.95),
        target(name=f"{case.name}: replica dropped / ours", value=dropped / ours, goal=1.3),
        target(name=f"{case.name}: rerouted / ours", value=rerouted / ours, goal=1.3),
        target(name=f"{case.name}: simulated / measured", value=found["ours"]["simulated_s"] / ours, goal=0.9),
        Target(name=f"{case.name}: pause", value=found["ours"]["pause_steps"], unit="steps", goal=1.0),
    ]


if __name__ == "__main__":
    main()
