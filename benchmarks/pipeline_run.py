"""A pipeline's run for the benchmark: layers that wait instead of computing, and a hand on the run's ranks."""

from __future__ import annotations

import contextlib
import functools
import json
import statistics
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import ray
import torch
from torch import Tensor, nn

import resilient
from actors import launch
from benchmarks.hosts import kill_hosts
from benchmarks.pipeline_model import Layer, Split, widths
from resilient.demo_model import SourceText
from resilient.demo_pipeline_model import LAYERS as BLOCKS
from resilient.demo_pipeline_model import Block, Embedding, Head, loss_of

NAME = "bench-pipeline"
LAYERS, MICRO_BATCHES = 16, 32
LAYER = Layer(forward_s=0.020, backward_s=0.040)
WIDTH = 64
LAYER_BYTES = WIDTH * 4
WARM_UP = 1
"""The first steps of a generation do not count."""
LIMIT_S = 240.0


class Wait(torch.autograd.Function):
    """The identity, which takes its time both ways."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, began: float) -> Tensor:
        wait_until(began + LAYER.forward_s)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        wait_until(time.perf_counter() + LAYER.backward_s)
        return gradient.clone(), None


def wait_until(at: float) -> None:
    time.sleep(max(0.0, at - time.perf_counter() - late_s()))


@functools.cache
def late_s() -> float:
    """How much longer this process usually sleeps than it was asked to."""
    late = []
    for _ in range(50):
        began = time.perf_counter()
        time.sleep(0.002)
        late.append(time.perf_counter() - began - 0.002)
    return min(statistics.median(late), LAYER.forward_s / 10)


class Waiting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        began = time.perf_counter()
        found: Tensor = Wait.apply(x * self.weight, began)  # type: ignore[no-untyped-call]
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
    late_s()
    pipe = run.pipeline([Waiting] * LAYERS, mean_square, stages=stages, rank_bytes=rank_bytes)
    _train(run, pipe, Points(), MICRO_BATCHES, 1, trace)


def real(run: resilient.Run, trace: str, stages: int) -> None:
    """The same with layers that compute."""
    tied = {f"layers.{BLOCKS + 1}.words.weight": "layers.0.words.weight"}
    pipe = run.pipeline([Embedding, *[Block] * BLOCKS, Head], loss_of, stages=stages, tied=tied)
    _train(run, pipe, SourceText(), 4 * MICRO_BATCHES, 4, trace)


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

    def generation_of(self, ranks: int) -> int:
        """The newest generation, once it has so many ranks and has committed a step."""
        _until(lambda: (rows := self.rows()) and rows[-1]["ranks"] == ranks, f"{ranks} ranks")
        return int(self.rows()[-1]["generation"])

    def steps_of(self, ranks: int, steps: int) -> list[float]:
        """The duration of each of so many steps in the newest generation, which has so many ranks."""

        def taken() -> list[float]:
            rows = self.rows()
            if not rows or rows[-1]["ranks"] != ranks:
                return []
            own = [row["at"] for row in rows if row["generation"] == rows[-1]["generation"]]
            return [after - before for before, after in pairwise(own)][WARM_UP:]

        _until(lambda: len(taken()) >= steps, f"{steps} steps of {ranks} ranks")
        return taken()[:steps]

    def pause_steps(self, since: int) -> float:
        """Of the planned changes after this generation, the longest: the time from one commit to the next, beyond what
        a step takes, in steps. Layers move after the commit that a row of the new generation tells first. The step
        before it counts too, in which joiners receive state, unless it is the one in which a rank was lost."""
        rows = self.rows()
        pauses = []
        for generation in sorted({row["generation"] for row in rows if row["generation"] > since}):
            at = next(place for place, row in enumerate(rows) if row["generation"] == generation)
            lost = rows[at]["ranks"] < rows[at - 1]["ranks"]
            pauses.append(self._beyond(rows, at + 1))
            if not lost:
                pauses.append(self._beyond(rows, at))
        return max(pauses)

    def _beyond(self, rows: list[dict[str, Any]], at: int) -> float:
        """The step that this row ends, beyond the others of those that were done as it was, in such steps."""
        generation = rows[at - 1]["generation"]
        own = [row["at"] for row in rows if row["generation"] == generation]
        times = [after - before for before, after in pairwise(own)][WARM_UP:]
        step_s = statistics.median(times) if times else rows[at]["at"] - rows[at - 1]["at"]
        taken_s: float = rows[at]["at"] - rows[at - 1]["at"]
        return taken_s / step_s - 1

    @property
    def controller(self) -> Any:
        (name,) = (name for name in launch.names(f"{NAME}/") if name.endswith("/controller"))
        return launch.find(name)

    def stages(self) -> list[list[tuple[int, str]]]:
        """Member and node of each rank, by stage."""
        seen = ray.get(self.controller.processes.remote())
        return [[seen["ranks"][rank] for rank in ranks] for ranks in seen["stages"]]

    def recoveries(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = ray.get(self.controller.look.remote())["recoveries"]
        return found

    def split(self) -> Split:
        """Of the newest generation."""
        seats = ray.get(self.controller.look.remote())["ranks"]
        stages = sorted({tuple(seat["layers"]) for seat in seats})
        return widths([(first, stop, sum(seat["layers"] == [first, stop] for seat in seats)) for first, stop in stages])

    def lose(self, members: list[int]) -> None:
        """With their nodes, all in the same moment."""
        names = launch.names(f"{NAME}/")
        actors = [launch.find(name) for name in names if name.split("/rank/")[-1] in set(map(str, members))]
        kill_hosts(ray.get([actor.process.remote() for actor in actors]))

    def stop(self) -> None:
        self.controller.stop.remote("it has been measured")
        self._thread.join(LIMIT_S)


def _until(holds: Any, what: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not holds():
        assert time.monotonic() < deadline, f"not within {LIMIT_S} s: {what}"
        time.sleep(0.1)
