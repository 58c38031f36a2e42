"""How long a death stops training, and what exactness costs while nobody dies.

    python -m benchmarks.recovery                writes out/bench/recovery.json
    python -m benchmarks.recovery peers          measures this part only: ddp, kills or peers

Recovery: four ranks train; one at a time is SIGKILLed at a random moment, and replaced. From the kill
to the next committed step, minus what was left of the undisturbed step, minus the time of the
micro-batches that had to be computed again. Peers: the same faults beside torchft and Ray Train (against_peers.py).
"""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import ray
import torch
from rich.progress import Progress
from torch import nn
from torch.nn import functional

import resilient
from actors import launch
from benchmarks import against_peers
from benchmarks.against_ddp import MICRO_BATCHES, measure
from benchmarks.outcome import Target, write
from resilient.demo_model import GPT, SourceText

KILLS = 24
RANKS = 4
QUIET_STEPS = 6
"""Undisturbed steps with all ranks before each kill."""
LIMIT_S = 900.0
DDP_GOALS = {2: 1.10, 3: 1.25, 4: 1.10}
OUT = Path("out/bench/recovery.json")


def body(run: resilient.Run, trace: str, stop: str) -> None:
    """Trains until the file `stop` exists; writes down when each micro-batch began and ended."""
    torch.manual_seed(0)
    model = GPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    run.protect(model=model, optimizer=optimizer)
    with open(Path(trace) / f"{os.getpid()}.jsonl", "a", buffering=1) as lines:
        for x, y in run.batches(SourceText(), global_batch=48, micro_batch=48 // MICRO_BATCHES, steps=1_000_000):
            began = time.monotonic()
            loss = functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
            loss.backward()
            ended = time.monotonic()
            row = {"step": run.step, "began": began, "ended": ended, "commit": run.committing}
            lines.write(json.dumps(row) + "\n")
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            run.state["stop"] = run.committing and (run.step > 100_000 or _agreed_stop(run, stop))
            if run.state["stop"]:
                break


def _agreed_stop(run: resilient.Run, stop: str) -> bool:
    """All ranks must leave at the same step: the file names one in the future."""
    try:
        return run.step >= int(Path(stop).read_text())
    except (FileNotFoundError, ValueError):
        return False


class Killer:
    """Finds and kills ranks of a running attempt."""

    def __init__(self, name: str) -> None:
        self.name = name

    def processes(self) -> dict[str, Any]:
        (found,) = (name for name in launch.names(f"{self.name}/") if name.endswith("/controller"))
        news: dict[str, Any] = ray.get(launch.find(found).processes.remote(), timeout=30)
        return news

    def when_quiet(self) -> dict[str, Any]:
        """Wait until all ranks are seated and a few steps have gone by since."""
        since: tuple[int, int] | None = None
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            now = self.processes()
            if len(now["ranks"]) < RANKS or now["generation"] != now["formed"]:
                since = None
            elif since is None or since[0] != now["generation"]:
                since = now["generation"], now["step"]
            elif now["step"] >= since[1] + QUIET_STEPS:
                return now
            time.sleep(0.02)
        raise TimeoutError(f"no quiet moment within 120 s: {now}")

    def kill(self, draw: random.Random) -> dict[str, Any]:
        now = self.when_quiet()
        rank = draw.randrange(RANKS)
        member, _ = now["ranks"][rank]
        (found,) = (name for name in launch.names(f"{self.name}/") if name.endswith(f"/rank/{member}"))
        pid = ray.get(launch.find(found).process.remote(), timeout=30)
        time.sleep(draw.random() * 0.7)
        os.kill(pid, signal.SIGKILL)
        return {"at": time.monotonic(), "pid": pid, "rank": rank}


def recoveries(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Kill again and again; the kills, and what the controller recorded of each recovery."""
    trace, stop = folder / "trace", folder / "stop"
    trace.mkdir()
    train = resilient.train(name="bench-recovery", workers=(2, RANKS))(body)
    ended: dict[str, Any] = {}

    def follow() -> None:
        ended["result"] = train.watched(lambda news: None, trace=str(trace), stop=str(stop))

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    killer, draw, kills = Killer("bench-recovery"), random.Random(7), []
    _until(lambda: [name for name in launch.names("bench-recovery/") if "/rank/" in name], 120)
    with Progress() as progress:
        task = progress.add_task("killing ranks", total=KILLS)
        for _ in range(KILLS):
            kills.append(killer.kill(draw))
            progress.advance(task)
    now = killer.when_quiet()
    stop.with_suffix(".new").write_text(str(now["step"] + 40))
    stop.with_suffix(".new").rename(stop)
    thread.join(120)
    return [{**kill, **stood_still(trace, kill)} for kill in kills], ended["result"].recoveries


def _until(true: Any, limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while not true():
        if time.monotonic() > deadline:
            raise TimeoutError("the run has not started")
        time.sleep(0.1)


def stood_still(trace: Path, kill: dict[str, Any]) -> dict[str, float]:
    """What a kill cost, from the ranks' own records."""
    rows = {
        int(path.stem): [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        for path in trace.glob("*.jsonl")
    }
    at = kill["at"]
    survivors = {
        pid: own for pid, own in rows.items() if pid != kill["pid"] and own and own[0]["began"] < at < own[-1]["ended"]
    }
    commits = [[row for row in own if row["commit"]] for own in survivors.values()]
    next_commit = max(min(row["ended"] for row in own if row["ended"] > at) for own in commits)
    last_commit = max(max(row["ended"] for row in own if row["ended"] <= at) for own in commits)
    quiet = [_step_times(own, at) for own in commits]
    step_s = statistics.median(time_s for times in quiet for time_s in times)
    step = next(row["step"] for row in commits[0] if row["ended"] > at)
    per_rank = MICRO_BATCHES // RANKS
    leaf_s = statistics.median(
        row["ended"] - row["began"]
        for own in survivors.values()
        for row in own
        if at - 5 < row["ended"] < at and not row["commit"]
    )
    extra = max(sum(row["step"] == step for row in own) - per_rank for own in survivors.values())
    remainder_s = max(0.0, last_commit + step_s - at)
    return {
        "to_next_commit_s": next_commit - at,
        "remainder_s": remainder_s,
        "recomputed": extra,
        "recompute_s": max(extra, 0) * leaf_s,
        "step_s": step_s,
        "overhead_s": next_commit - at - remainder_s - max(extra, 0) * leaf_s,
    }


def _step_times(commits: list[dict[str, Any]], at: float) -> list[float]:
    before = [row["ended"] for row in commits if row["ended"] <= at][-QUIET_STEPS:]
    return [later - earlier for earlier, later in pairwise(before)]


PARTS = ("ddp", "kills", "peers")


def main() -> None:
    """Parts to measure may be named; what is left out is taken over from the last result."""
    parts = sys.argv[1:] or list(PARTS)
    if unknown := sorted(set(parts) - set(PARTS)):
        sys.exit(f"unknown parts {unknown}: choose from {', '.join(PARTS)}")
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    samples: dict[str, Any] = json.loads(OUT.read_text())["samples"] if OUT.exists() and sys.argv[1:] else {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "ddp" in parts or "kills" in parts:
            ray.init(
                address="local",
                num_cpus=RANKS + 1,
                object_store_memory=80 << 20,
                log_to_driver=False,
                include_dashboard=False,
            )
            if "ddp" in parts:
                samples["ddp"] = {str(ranks): measure(ranks, folder) for ranks in DDP_GOALS}
            if "kills" in parts:
                samples["kills"], samples["recoveries"] = recoveries(folder)
            ray.shutdown()
        if "peers" in parts:
            samples["peers"] = against_peers.compare(folder / "peers", OUT.parent.absolute())
    write(OUT, targets(samples), samples)


def targets(samples: dict[str, Any]) -> list[Target]:
    found = []
    for ranks, times in samples.get("ddp", {}).items():
        ratio = statistics.median(times["ours"]) / statistics.median(times["theirs"])
        goal = DDP_GOALS[int(ranks)]
        found.append(Target(name=f"step time against DDP, {ranks} ranks", value=ratio, unit="x", goal=goal))
    if kills := samples.get("kills"):
        overheads = [kill["overhead_s"] for kill in kills]
        found.append(Target(name="stand-still, median", value=statistics.median(overheads), unit="s", goal=0.3))
        found.append(Target(name="stand-still, worst", value=max(overheads), unit="s", goal=1.0))
    if peers := samples.get("peers"):
        found += against_peers.targets(peers)
    return found


if __name__ == "__main__":
    main()
