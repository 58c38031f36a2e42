"""The decorator."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

from .check_report import CheckReport
from .imports import check_not_hidden
from .job import Checkpoint, Snapshot, settings_from
from .result import Result


def train(
    *,
    workers: int | tuple[int, int] = 1,
    spares: int = 0,
    resources: Mapping[str, float] | None = None,
    name: str | None = None,
    seed: int = 0,
    reduction: Literal["exact", "fast"] = "exact",
    detection_s: float = 2.0,
    wait_for_nodes_s: float = 600.0,
    allow_different_bits: bool = False,
    snapshot: Snapshot | None = None,
    checkpoint: Checkpoint | None = None,
    on_nonfinite: Literal["ignore", "stop", "skip", "rollback"] = "ignore",
    max_failures: int | None = None,
    evict_stragglers: bool = False,
    observe: str | None = "auto",
    ray_metrics: bool = False,
) -> Callable[[Callable[..., Any]], TrainFunction]:
    """Make a training function fault-tolerant. Its first argument is a `Run`; sys.argv is the driver's on every rank.

    workers: ranks to train with, or (min, max): the run uses up to max, and waits for nodes below min.
    spares: further processes that are started and wait in the loop, to take a lost rank's place at once.
    resources: of each rank, as Ray counts them; the default is one CPU. CPU is also the number of threads.
    name: of the run, unique in the cluster; the default is the function's.
    seed: decides the order of data and all randomness.
    reduction: "exact" sums gradients in an order that depends on nothing but the number of micro-batches,
        so that results have the same bits whatever fails; "fast" is a plain all-reduce.
    detection_s: how long a stopped process or a silent node may stay so before it is declared dead. What the
        operating system reports by itself is acted on at once.
    wait_for_nodes_s: how long a run may stand still below min before it fails.
    allow_different_bits: only warn when nodes compute different bits.
    snapshot: resilient.Snapshot(...): copies of the state in the nodes' memory, to go on from if all ranks have died.
    checkpoint: resilient.Checkpoint(url, ...): some of these copies go to storage in the background, for when memory
        can't help; with it, snapshots are on.
    on_nonfinite: what to do with a step whose loss or gradient is not finite: "stop" the run, "skip" the step
        (no update, no scheduler step, the next data), or "rollback" to the newest snapshot and leave that
        step's data out. With a GradScaler, which expects such gradients, only the loss counts.
    max_failures: ranks and nodes that may be lost within an hour before the run ends; None for any number. What
        leaves because it was told to doesn't count.
    evict_stragglers: a rank that takes three times as long as the others for long leaves, and another one is started
        on another node. Without it that is only said. Micro-batches are dealt by speed in any case.
    observe: where metrics and a live page are served, to be read by whoever reaches it: "auto" is a free port of the
        cluster's head node that only that node reaches, "HOST:PORT" or ":PORT" what you say, None nowhere.
    ray_metrics: metrics also appear among Ray's own, seconds late and all as gauges.

    Raises ValueError or TypeError naming field, value and what is allowed.
    """

    def decorate(function: Callable[..., Any]) -> TrainFunction:
        settings = settings_from(
            name=name if name is not None else function.__name__,
            workers=workers,
            spares=spares,
            resources=resources,
            seed=seed,
            reduction=reduction,
            detection_s=detection_s,
            wait_for_nodes_s=wait_for_nodes_s,
            allow_different_bits=allow_different_bits,
            snapshot=snapshot,
            checkpoint=checkpoint,
            on_nonfinite=on_nonfinite,
            max_failures=max_failures,
            evict_stragglers=evict_stragglers,
            observe=observe,
            ray_metrics=ray_metrics,
        )
        return TrainFunction(function, settings)

    return decorate


class TrainFunction:
    """A training function that survives. Call it to run on Ray; `local` runs it in this process."""

    def __init__(self, function: Callable[..., Any], settings: Any) -> None:
        functools.update_wrapper(self, function)
        self._function = function
        self.settings = settings

    def __call__(self, *args: Any, **kwargs: Any) -> Result:
        """Start or join Ray, run, and return the Result.

        Raises TrainingFailed for an exception in the training function, RunLost when the state was
        lost or no nodes came, RunStopped when somebody stopped it, KeyboardInterrupt on Ctrl-C after
        all processes have ended.
        """
        check_not_hidden()
        from .driver import run_on_ray
        from .progress import on_terminal

        with on_terminal(self.settings.name) as progress:
            return run_on_ray(self.settings, functools.partial(self.packed, args, kwargs), progress)

    def watched(self, progress: Callable[[dict[str, Any]], None], *args: Any, **kwargs: Any) -> Result:
        """As a call, but news goes to `progress`: step, generation, ranks, rows, recoveries, messages."""
        check_not_hidden()
        from .driver import run_on_ray

        return run_on_ray(self.settings, functools.partial(self.packed, args, kwargs), progress)

    def local(self, *args: Any, **kwargs: Any) -> Result:
        """Run in this process, without Ray: the same bits as on any number of ranks."""
        check_not_hidden()
        from .local import run_locally

        return run_locally(self.settings, functools.partial(self.packed, args, kwargs))

    def check(self, *args: Any, steps: int = 6, **kwargs: Any) -> CheckReport:
        """Run the first steps here, without Ray, in each layout that failures may bring, and compare the bits.

        One process, several ranks, a killed rank and its replacement, a stop and a resume; on the CPU. The report names
        the first value that differs, its layout and step, and the likely cause. The run's storage is not touched.
        Raises nothing for what it finds.
        """
        check_not_hidden()
        from .check import Check

        return Check(self.settings, self.packed(args, kwargs), steps).run()

    def packed(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bytes:
        from .packing import packed_call

        return packed_call(self._function, args, kwargs)
