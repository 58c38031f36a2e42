"""What a snapshot costs training, beside what others' cost. What is compared with what: docs/benchmarks-snapshot.md.

python -m benchmarks.snapshot        writes out/bench/snapshot.json
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from benchmarks import encoding, peer_venv
from benchmarks.outcome import Target, write
from benchmarks.snapshot_rank import Plan
from snapshot.room import NoRoom, check_room

OUT = Path("out/bench/snapshot.json")
LOGS = Path("out/bench")
MEMORY = Path("/dev/shm")
NODES = ("a", "b")
WORLDS = (1, 2)
SIZES = {
    64: {"rounds": 9, "blocks": 4, "block_steps": 4, "budget_s": 25.0},
    256: {"rounds": 7, "blocks": 3, "block_steps": 4, "budget_s": 35.0},
    1024: {"rounds": 4, "blocks": 2, "block_steps": 3, "budget_s": 60.0},
}
"""By MiB of state. budget_s: no new round or block begins after it, and on a busy machine earlier."""
TOTAL_S = 420.0
START_S = 15.0
"""Of one size, before its budget begins."""
ROOM_FACTOR = {1: 15, 2: 19}
"""By number of ranks: states, slots, parity, others' staging memory and files, in units of the state."""
LIMIT_S = 130.0
DCP = ("dcp process", "dcp process, copy at once", "dcp thread")
INCREASE_NOISE = 0.002
"""Inflation below this share of a step is not told from none."""


def main() -> None:
    python, why_not = peer_venv.prepare(LOGS.absolute() / "dlrover-venv", peer_venv.DLROVER)
    for log in LOGS.glob("snapshot-*.log"):
        log.unlink()
    load_before = os.getloadavg()[0]
    samples: dict[str, Any] = {"dlrover": why_not or "measured", "encoding": encoding.measure()}
    targets = of_encoding(samples["encoding"])
    ends = time.monotonic() + TOTAL_S
    plans = [Plan(nodes=NODES, world=w, dlrover=not why_not, state_mib=s, **SIZES[s]) for s in SIZES for w in WORLDS]  # type: ignore[arg-type]
    for number, plan in enumerate(plans):
        name = f"{plan.state_mib} MiB, {plan.world} rank{'s' * (plan.world > 1)}"
        began = time.monotonic()
        left_s = ends - began - START_S * (len(plans) - number)
        share = plan.budget_s / sum(later.budget_s for later in plans[number:])
        try:
            found = samples[name] = one_size(replace(plan, budget_s=min(plan.budget_s, left_s * share)), python)
            targets += of_size(name, found)
        except (RuntimeError, NoRoom) as error:
            samples[name] = {"not measured": str(error)}
        Console().print(f"{name}: {'not ' * ('steps' not in samples[name])}measured, {time.monotonic() - began:.0f} s")
    samples["load"] = {"before": round(load_before, 2), "after": round(os.getloadavg()[0], 2)}
    write(OUT, targets, samples)


def one_size(plan: Plan, python: Path) -> dict[str, Any]:
    """Keepers and ranks as processes; what the ranks have measured, and the keepers' tallies."""
    needed_bytes, free_bytes = ROOM_FACTOR[plan.world] * plan.state_mib << 20, psutil.virtual_memory().available
    check_room(MEMORY, needed_bytes, "the benchmark of snapshots")
    if needed_bytes > free_bytes:
        raise NoRoom(f"{needed_bytes / 2**30:.1f} GiB of memory needed, {free_bytes / 2**30:.1f} GiB available")
    shares = {node: [rank] if rank < plan.world else [] for rank, node in enumerate(plan.nodes)}
    with tempfile.TemporaryDirectory(dir=MEMORY, prefix="resilient-bench-") as name, contextlib.ExitStack() as stack:
        base = Path(name)
        keeper = (sys.executable, "-m", "benchmarks.snapshot_keeper", name)
        keepers = [stack.enter_context(running("keeper", *keeper, node, json.dumps(shares))) for node in plan.nodes]
        deadline = time.monotonic() + LIMIT_S
        while not all((base / f"{node}.ready").exists() for node in plan.nodes):
            if time.monotonic() > deadline or any(process.poll() is not None for process in keepers):
                raise RuntimeError(f"the keepers have not started, see {LOGS}/snapshot-keeper.log")
            time.sleep(0.05)
        rank = (str(python), "-m", "benchmarks.snapshot_rank", name)
        wanted = json.dumps(asdict(plan))
        ranks = [stack.enter_context(running("rank", *rank, str(n), wanted)) for n in range(plan.world)]
        while any(process.poll() is None for process in ranks):
            if time.monotonic() > deadline or any(process.poll() not in (None, 0) for process in ranks):
                raise RuntimeError(f"a rank has failed or takes too long, see {LOGS}/snapshot-rank.log")
            time.sleep(0.1)
        tallies = [json.loads(process.communicate(timeout=30)[0]) for process in keepers]
        reports = [json.loads((base / f"rank-{n}.json").read_text()) for n in range(plan.world)]
    return {**slowest(reports), "keepers": tallies}


@contextlib.contextmanager
def running(kind: str, *command: str) -> Iterator[subprocess.Popen[str]]:
    """A process in a session of its own, so that its helpers, too, are gone at the end."""
    with open(LOGS / f"snapshot-{kind}.log", "a") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for left in MEMORY.glob(f"bench-{os.getpid()}-*"):  # DLRover's, if its rank was killed
            left.unlink(missing_ok=True)


def slowest(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """One report of all ranks: for each sample, what the slowest of them has seen, since the others wait for it.

    With medians beside. inflation: by how much a step takes longer, as a share of a plain one, for each snapshot that
    was taken: who skips some does not gain by it.
    """
    merged = dict(reports[0])
    for part in ("one_by_one", "steps"):
        merged[part] = {
            name: [
                {key: max(sample[key] for sample in of_ranks) for key in of_ranks[0]}
                for of_ranks in zip(*(report[part][name] for report in reports), strict=True)
            ]
            for name in reports[0][part]
        }
    merged["medians"] = {
        part: {
            name: {key: statistics.median(sample[key] for sample in found) for key in found[0]}
            for name, found in merged[part].items()
        }
        for part in ("one_by_one", "steps")
    }
    for name, found in merged["steps"].items():
        if name != "plain":
            share = sum(sample["taken"] for sample in found) / len(found)
            longer = merged["medians"]["steps"][name]["step_s"] / merged["medians"]["steps"]["plain"]["step_s"] - 1
            merged["medians"]["steps"][name] |= {"taken": share, "inflation": longer / share if share else math.inf}
    return merged


def of_size(name: str, found: dict[str, Any]) -> list[Target]:
    for contestant, taken in found["one_by_one"].items():
        if not all(sample["taken"] for sample in taken):
            raise RuntimeError(f"{name}: {contestant} has skipped a snapshot that it had all the time for")
    medians, sizes = found["medians"], found["size_bytes"]
    single, steps = medians["one_by_one"], medians["steps"]
    ours, floor = single["ours"], single["memcpy"]
    speed = (sizes["ours"] / ours["mutable_s"]) / (sizes["memcpy"] / floor["mutable_s"])
    protected = sizes["ours"] / (ours["settled_s"] - ours["mutable_s"]) / 1e9
    targets = [
        Target(name=f"{name}: capture against memcpy", value=speed, unit="x", goal=0.9, at_least=True),
        Target(name=f"{name}: protected, per keeper", value=protected, unit="GB/s", goal=1.0, at_least=True),
    ]
    if at_once := [single[other]["mutable_s"] for other in DCP if other in single]:
        value = ours["blocked_s"] / min(at_once)
        targets.append(Target(name=f"{name}: blocked, against DCP's save and wait", value=value, unit="x", goal=0.1))
    if "dcp process" in single:
        value = ours["blocked_s"] / single["dcp process"]["blocked_s"]
        targets.append(
            Target(name=f"{name}: blocked, against DCP waiting at our gate", value=value, unit="x", goal=0.1)
        )
        theirs = max(steps["dcp process"]["inflation"], INCREASE_NOISE)
        value = max(steps["ours"]["inflation"], 0.0) / theirs
        targets.append(Target(name=f"{name}: step inflation, against DCP's", value=value, unit="x", goal=0.2))
    return targets


def of_encoding(found: dict[str, Any]) -> list[Target]:
    targets = []
    for code, measured in found.items():
        medians = {name: statistics.median(times) for name, times in measured["seconds"].items()}
        measured["gigabytes_per_s"] = {name: measured["data_bytes"] / time_s / 1e9 for name, time_s in medians.items()}
        for name, theirs in (("encode", "ec_encode_data"), ("update", "ec_encode_data_update")):
            value = medians[theirs] / medians[name]
            targets.append(
                Target(name=f"{name}, {code}, against ISA-L", value=value, unit="x", goal=0.8, at_least=True)
            )
    return targets


if __name__ == "__main__":
    main()
