"""Durable checkpoints beside others': saving and loading on the same disk, and what saving costs training.

python -m benchmarks.durable [MIB...]        writes out/bench/durable.json

What is compared with what: docs/benchmarks-durable.md.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from actors.saving import SaveSpec
from benchmarks import durable_contestants as contestants
from benchmarks.durable_contestants import Contestant
from benchmarks.gpt import Training
from benchmarks.outcome import Target, write
from benchmarks.snapshot_keeper import ATTEMPT, GENERATION, RUN
from resilient.core.cadence import Cadence
from resilient.core.lane import Agreed
from resilient.core.saves import Saves
from resilient.snapshots import Seating, Snapshots
from snapshot.core.lifecycle import Ordinal

OUT = Path("out/bench/durable.json")
DISK = Path("out/bench/durable-disk")
STATES_MIB = [256, 1024]
LEVELS = {"zstd-1": 1, "raw": None}
ROUNDS = 5
DEFAULT_INTERVAL_S = 600.0
STEP_S = 0.4
PLAIN_STEPS, SAVES = 8, 4
SAVE_LIMIT_S = 120.0
SETTLE_S = 0.3
"""For the disk to be done with what was deleted."""


def main() -> None:
    sizes = [int(size) for size in sys.argv[1:]] or STATES_MIB
    logging.disable(logging.INFO)  # DCP's background process tells of every request
    torch.set_num_threads(1)
    DISK.mkdir(parents=True, exist_ok=True)
    load_before = os.getloadavg()[0]
    samples: dict[str, Any] = {}
    found: list[Target] = []
    with tempfile.TemporaryDirectory(dir=DISK) as name:
        folder = Path(name).absolute()
        store = dist.FileStore(str(folder / "meeting"), 1)  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        for size in sizes:
            samples[f"{size} MiB"] = measured = one_size(size, folder / str(size))
            found += targets(f"{size} MiB", measured)
        dist.destroy_process_group()
    samples["load"] = {"before": round(load_before, 2), "after": round(os.getloadavg()[0], 2)}
    write(OUT, found, samples)


def one_size(size_mib: int, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    training = Training(size_mib)
    return {
        "state_bytes": training.state_bytes,
        "seconds": save_and_load(contestants.field(training, folder)),
        "training": {name: beside_training(training, folder / name, level) for name, level in LEVELS.items()},
    }


def save_and_load(field: dict[str, Contestant]) -> dict[str, dict[str, list[float]]]:
    """Turn by turn, each round beginning with another; the first round is not counted. Loads are from the page cache,
    and from disk ("cold")."""
    seconds: dict[str, dict[str, list[float]]] = {name: {"save": [], "load": [], "load cold": []} for name in field}
    for number in range(ROUNDS + 1):
        for name, contestant in rotated(list(field.items()), number):
            os.sync()  # nobody pays for what others have left to be written
            time.sleep(SETTLE_S)
            times = {"save": timed(contestant.save)}
            if contestant.load is not None:
                times["load"] = timed(contestant.load)
                contestants.evict(contestant.folder)
                times["load cold"] = timed(contestant.load)
            contestant.clear()
            if number:
                for what, time_s in times.items():
                    seconds[name][what].append(time_s)
        Console().print(f"round {number} of {ROUNDS}")
    for contestant in field.values():
        contestant.close()
    return seconds


def rotated(items: list[Any], by: int) -> list[Any]:
    by %= len(items)
    return items[by:] + items[:by]


def timed(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


def beside_training(training: Training, folder: Path, level: int | None) -> dict[str, Any]:
    """Steps with a snapshot each, and then the same while checkpoints are written by a keeper of its own process.

    A checkpoint's cost is what the steps from its capture to its commit take longer than the median of those before.
    """
    memory = folder / "memory"
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="resilient-bench-") as shared:
        memory = Path(shared)
        spec = SaveSpec(run=RUN, node="a", url=str(folder / "disk"), keep=1, level=level, token="00000000")
        command = (sys.executable, "-m", "benchmarks.snapshot_keeper", shared, "a", json.dumps({"a": [0]}))
        keeper = subprocess.Popen(
            [*command, json.dumps(asdict(spec))], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            while not (memory / "a.ready").exists():
                time.sleep(0.02)
            return _Loop(training, memory / "a", folder / "disk").measure()
        finally:
            keeper.communicate()


class _Loop:
    def __init__(self, training: Training, folder: Path, disk: Path) -> None:
        self._training, self._disk = training, disk
        self._saves = Saves(every_steps=1 << 40)
        self._snapshots = Snapshots(
            run=RUN,
            attempt=ATTEMPT,
            folder=folder,
            member=0,
            device=torch.device("cpu"),
            cadence=Cadence(every=4, budget=1.0),
            say=print,
            saves=self._saves,
        )
        self._objects = {"model": training.model, "optimizer": training.optimizer}
        self._step = 0

    def measure(self) -> dict[str, Any]:
        self._training.calibrate(STEP_S)
        for _ in range(6):
            self._one()
        rows = []
        for _ in range(SAVES):
            plain = [self._one() for _ in range(PLAIN_STEPS)]
            self._saves.every_steps = 1
            began, steps = time.monotonic(), [self._one()]
            self._saves.every_steps = 1 << 40
            before = set(self._disk.glob("*/manifest.json"))
            while set(self._disk.glob("*/manifest.json")) <= before:
                steps.append(self._one())
                if time.monotonic() - began > SAVE_LIMIT_S:
                    raise TimeoutError(f"no checkpoint within {SAVE_LIMIT_S:.0f} s: {self._snapshots.tally}")
            rows.append({"plain_s": plain, "saving_s": steps, "durable_s": time.monotonic() - began})
        return {"rows": rows, **self._judged(rows)}

    def _judged(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        plain_s = statistics.median(step for row in rows for step in row["plain_s"])
        extra_s = statistics.median(sum(step - plain_s for step in row["saving_s"]) for row in rows)
        during = statistics.median(statistics.mean(row["saving_s"]) for row in rows) / plain_s - 1
        return {
            "plain_step_s": plain_s,
            "extra_s_per_checkpoint": extra_s,
            "slowdown_while_saving": during,
            "slowdown_at_default_interval": extra_s / DEFAULT_INTERVAL_S,
            "durable_s": statistics.median(row["durable_s"] for row in rows),
        }

    def _one(self) -> float:
        began = time.monotonic()
        self._step += 1
        ordinal = Ordinal(0, self._step)
        agreed = Agreed.of(self._snapshots.wish(ordinal, GENERATION).lane())
        self._snapshots.agreed(ordinal, agreed)
        self._training.step(self._snapshots.gate)
        seating = Seating(generation=GENERATION, rank=0, world=1)
        self._snapshots.boundary(ordinal, self._objects, seating, wanted=agreed.capture, durable=agreed.save)
        return time.monotonic() - began


def targets(size: str, samples: dict[str, Any]) -> list[Target]:
    state_bytes = samples["state_bytes"]
    medians = {
        name: {what: statistics.median(times) for what, times in of.items() if times}
        for name, of in samples["seconds"].items()
    }
    samples["gigabytes_per_s"] = {
        name: {what: state_bytes / time_s / 1e9 for what, time_s in of.items()} for name, of in medians.items()
    }
    dcp = medians["dcp process"]
    saved = medians["plain write"]["save"] / medians["ours, raw"]["save"]
    found = [Target(name=f"{size}: save, raw, against a plain write", value=saved, unit="x", goal=0.9, at_least=True)]
    for what in ("load", "load cold"):
        for coding in LEVELS:
            value = dcp[what] / medians[f"ours, {coding}"][what]
            name = f"{size}: {what}, {coding}, against DCP's"
            found.append(Target(name=name, value=value, unit="x", goal=2.0, at_least=True))
    for coding, judged in samples["training"].items():
        value = judged["slowdown_at_default_interval"]
        found.append(Target(name=f"{size}: training's slow-down, {coding}", value=value, unit="", goal=0.03))
    return found


if __name__ == "__main__":
    main()
