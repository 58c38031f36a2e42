"""The same faults, side by side: ours, torchft and Ray Train, each with three ranks and room for one more.

What is compared: for how long no step is committed beyond the undisturbed step, how many steps are computed again, how
many samples are thrown away. All train the loop of `benchmarks.peer_rank`, whose computing is mostly waiting, so that
the cores are not what is compared.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from actors import launch
from benchmarks import peer_venv
from benchmarks.hosts import host_of, kill_hosts, send
from benchmarks.outcome import Target
from benchmarks.peer_rank import SAMPLES, read_traces
from benchmarks.resilient_run import NAME

RANKS = 3
QUIET_S = 2.0
"""All ranks commit for so long before a fault."""
SETTLES_S = 4.0
"""No fault's effect begins later."""
START_LIMIT_S = 150.0
GIVEN_UP_S = 75.0
"""After so long without a step the contestant counts as standing still for good."""
TORCHFT = {
    "torchft, heartbeat 5000 ms": (5000, 10_000, 60),
    "torchft, heartbeat 1000 ms": (1000, 10_000, 60),
    "torchft, all timeouts short": (1000, 100, 5),
}
"""Heartbeat and join timeout of its lighthouse, in ms, and the time that its collectives may take, in seconds: its
defaults, with the join timeout of its documentation; with a short heartbeat; and with times that no healthy replica may
exceed either, be it for a slow step."""
DEFAULTS = ("torchft, heartbeat 5000 ms", "Ray Train")


@dataclass(slots=True)
class Contestant:
    """A process that trains until it is killed, and the ranks under it."""

    folder: Path
    command: list[str]
    root: subprocess.Popen[str] | None = None

    def __enter__(self) -> Contestant:
        self.trace.mkdir(parents=True)
        with open(self.folder / "log", "w") as log:
            self.root = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=log, stderr=log, text=True, env=environment()
            )
        return self

    def __exit__(self, *_: object) -> None:
        assert self.root is not None
        end_all([self.root.pid])

    @property
    def trace(self) -> Path:
        return self.folder / "trace"

    def tell(self, command: str) -> None:
        assert self.root is not None and self.root.stdin is not None
        self.root.stdin.write(command + "\n")
        self.root.stdin.flush()

    def ranks(self) -> list[int]:
        """Process ids of those that have committed a moment ago."""
        rows = [row for row in read_traces(self.trace) if row["committed"] and row["at"] > time.monotonic() - 1.0]
        return sorted({int(row["pid"]) for row in rows})

    def when_quiet(self, ranks: int = RANKS) -> list[int]:
        since, known, deadline = 0.0, [], time.monotonic() + START_LIMIT_S
        while time.monotonic() < deadline:
            now = self.ranks()
            if len(now) != ranks or now != known:
                since, known = time.monotonic(), now
            elif time.monotonic() - since > QUIET_S:
                return now
            time.sleep(0.1)
        raise TimeoutError(f"{self.command[2:4]}: not {ranks} ranks that train: {known}; see {self.folder / 'log'}")


@dataclass(slots=True)
class Ours(Contestant):
    """Its nodes end like machines: their memory with them."""

    def __exit__(self, *_: object) -> None:
        Contestant.__exit__(self)
        for folder in Path(launch.FOLDER).glob(f"{NAME}-*"):
            shutil.rmtree(folder, ignore_errors=True)


@dataclass(slots=True)
class Torchft(Contestant):
    """The root is the lighthouse; replicas are started by hand, as a scheduler would."""

    limit_s: int = 60
    """Of a collective."""
    address: str = ""
    replicas: list[subprocess.Popen[str]] = field(default_factory=list)

    def __enter__(self) -> Contestant:
        self.trace.mkdir(parents=True)
        self.root = subprocess.Popen(
            self.command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment()
        )
        assert self.root.stdout is not None
        self.address = self.root.stdout.readline().strip()
        for _ in range(RANKS):
            self.start_replica()
        return self

    def start_replica(self) -> None:
        command = [self.command[0], "-m", "benchmarks.torchft_rank", self.address, str(self.trace)]
        command += [f"replica{len(self.replicas)}", str(RANKS), str(self.folder / "stop"), str(self.limit_s)]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "text": True}
        self.replicas.append(subprocess.Popen(command, env=environment(), **quiet))  # type: ignore[call-overload]

    def __exit__(self, *_: object) -> None:
        assert self.root is not None
        end_all([self.root.pid, *(replica.pid for replica in self.replicas)])
        for process in (self.root, *self.replicas):
            process.wait()


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "RAY_AUTH_MODE": "disabled", "RUST_LOG": "off"}


def end_all(roots: list[int]) -> None:
    """These processes, and all that they have started."""
    processes = []
    for pid in roots:
        with contextlib.suppress(psutil.NoSuchProcess):
            processes += [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]
    send(processes, signal.SIGSTOP)
    send(processes, signal.SIGKILL)
    psutil.wait_procs(processes, timeout=20)


# Faults


def kill(pid: int) -> list[psutil.Process]:
    os.kill(pid, signal.SIGKILL)
    return []


def stop(pid: int) -> list[psutil.Process]:
    os.kill(pid, signal.SIGSTOP)
    return [psutil.Process(pid)]


def kill_host(pid: int) -> list[psutil.Process]:
    kill_hosts([pid])
    return []


def stop_host(pid: int) -> list[psutil.Process]:
    processes = host_of(pid)
    send(processes, signal.SIGSTOP)
    return processes


FAULTS: dict[str, Callable[[int], list[psutil.Process]]] = {
    "process killed": kill,
    "process stopped": stop,
    "host killed": kill_host,
    "host stopped": stop_host,
}


# What came of it


def measured(rows: list[dict[str, Any]], at: float, victims: set[int]) -> dict[str, float]:
    """Of a fault at this time, once all is quiet again.

    stood_still_s: the longest time without a commit of anybody's, without the undisturbed time of a step.
    """
    others = [row for row in rows if row["committed"] and row["pid"] not in victims]
    before, after = [row for row in others if row["at"] <= at], [row for row in others if row["at"] > at]
    newest = max(int(row["step"]) for row in before)
    step_s = undisturbed_s(before)
    return {
        "stood_still_s": longest_gap_s(others, at) - step_s,
        "step_s": step_s,
        "recomputed_steps": len({row["step"] for row in after if _again(row, before, newest)}),
        "lost_samples": sum(int(row["samples"]) for row in rows if not row["committed"] and row["at"] > at),
    }


def longest_gap_s(commits: list[dict[str, Any]], at: float) -> float:
    """Between two commits, of which the later one came after this moment."""
    moments = [float(row["at"]) for row in commits]
    return max(later - earlier for earlier, later in pairwise(moments) if later > at)


def undisturbed_s(commits: list[dict[str, Any]]) -> float:
    """Median time of the last steps."""
    return statistics.median(later - earlier for earlier, later in pairwise(first_commits(commits)[-20:]))


def _again(row: dict[str, Any], before: list[dict[str, Any]], newest: int) -> bool:
    """Whether it repeats a step: one that this process had committed, or, if it is a new one, anybody."""
    own = [int(former["step"]) for former in before if former["pid"] == row["pid"]]
    return int(row["step"]) <= (max(own) if own else newest)


def first_commits(commits: list[dict[str, Any]]) -> list[float]:
    """When each step was first committed by anybody, ascending."""
    found: dict[int, float] = {}
    for row in commits:
        found.setdefault(int(row["step"]), float(row["at"]))
    return sorted(found.values())


def strike(contestant: Contestant, fault: str) -> dict[str, float]:
    """Wait for a quiet moment, strike at one rank, and wait for the next step."""
    pids = contestant.when_quiet()
    victim = pids[-1]
    at = time.monotonic()
    frozen = FAULTS[fault](victim)
    try:
        outcome = await_step(contestant, at, {victim})
    finally:
        send(frozen, signal.SIGKILL)
    return outcome


def await_step(contestant: Contestant, at: float, victims: set[int]) -> dict[str, float]:
    """Until steps are committed again as before the fault, whose effect may come a moment later."""
    while (now := time.monotonic()) < at + GIVEN_UP_S:
        time.sleep(0.5)
        rows = read_traces(contestant.trace)
        alive = [row for row in rows if row["committed"] and row["pid"] not in victims and row["at"] > now - QUIET_S]
        steady = len(alive) > 1 and longest_gap_s(alive, 0.0) < QUIET_S / 2 and alive[-1]["at"] > now - QUIET_S / 2
        if now > at + SETTLES_S and steady:
            return measured(rows, at, victims)
    return {"stood_still_s": GIVEN_UP_S, "step_s": 0.0, "recomputed_steps": 0, "lost_samples": 0, "given_up": 1}


def planned(contestant: Contestant, command: str, before: int, after: int) -> dict[str, float]:
    """Of a change that is asked for: the longest time between two commits while it happens, and what is lost by it."""
    pids = contestant.when_quiet(before)
    at = time.monotonic()
    contestant.tell(f"{command} {pids[-1]}")
    contestant.when_quiet(after)
    rows = read_traces(contestant.trace)
    commits = [row for row in rows if row["committed"]]
    step_s = undisturbed_s([row for row in commits if row["at"] <= at])
    stood_still_s = longest_gap_s(commits, at) - step_s
    return {
        "stood_still_s": stood_still_s,
        "step_s": step_s,
        "steps_lost": stood_still_s / step_s,
        "recomputed_samples": sum(int(row["samples"]) for row in rows) - SAMPLES * len(first_commits(commits)),
    }


Start = Callable[[str], Contestant]


def contestants(folder: Path, out: Path) -> Iterator[tuple[str, Start, tuple[str, ...]]]:
    """Name, how to start it, and the faults that mean something there."""
    ours = [sys.executable, "-m", "benchmarks.resilient_run"]
    yield "resilient", lambda name: _ours(folder / name, ours, RANKS + 1), tuple(FAULTS)
    python, why_not = peer_venv.prepare(out / "torchft-venv", peer_venv.TORCHFT)
    for variant, timeouts in TORCHFT.items() if not why_not else ():
        command = [str(python), "-m", "benchmarks.lighthouse", *map(str, timeouts[:2])]
        # A replica is one process; that its host dies with it makes no difference to the others.
        yield (
            variant,
            lambda name, command=command, limit_s=timeouts[2]: Torchft(folder / name, command, limit_s=limit_s),
            ("process killed", "process stopped"),
        )
    if why_not:
        print(f"torchft is not compared: {why_not}", flush=True)
    python, why_not = peer_venv.prepare(out / "ray-train-venv", peer_venv.RAY_TRAIN)
    if why_not:
        print(f"Ray Train is not compared: {why_not}", flush=True)
        return
    command = [str(python), "-m", "benchmarks.ray_train_run"]
    yield "Ray Train", lambda name: _theirs(folder / name, command), tuple(FAULTS)


def _ours(folder: Path, command: list[str], places: int) -> Contestant:
    return Ours(folder, [*command, str(folder / "trace"), str(RANKS), str(places)])


def _theirs(folder: Path, command: list[str]) -> Contestant:
    return Contestant(folder, [*command, str(folder / "trace"), str(RANKS)])


# All of them

STRIKES = {"process killed": 3, "process stopped": 2, "host killed": 1, "host stopped": 1}
"""At one run. A host does not come back."""
Outcomes = dict[str, dict[str, list[dict[str, float]]]]


def compare(folder: Path, out: Path) -> Outcomes:
    """By contestant and fault; what each strike came to."""
    outcomes: Outcomes = {}
    for name, start, faults in contestants(folder, out):
        for fault in faults:
            found = outcomes.setdefault(name, {})[fault] = []
            with start(f"{len(outcomes)}-{fault}") as contestant:
                for _ in range(STRIKES[fault]):
                    found.append(strike(contestant, fault))
                    print(f"{name}, {fault}: {found[-1]}", flush=True)
                    if "given_up" in found[-1]:
                        break
                    if isinstance(contestant, Torchft):
                        contestant.start_replica()
    ours = [sys.executable, "-m", "benchmarks.resilient_run"]
    with _ours(folder / "join", ours, RANKS - 1) as contestant:
        outcomes["resilient"]["node joins"] = [planned(contestant, "join", RANKS - 1, RANKS)]
    with _ours(folder / "drain", ours, RANKS) as contestant:
        outcomes["resilient"]["node drained"] = [planned(contestant, "drain", RANKS, RANKS - 1)]
    return outcomes


def median_s(outcomes: Outcomes, name: str, fault: str) -> float:
    return statistics.median(one["stood_still_s"] for one in outcomes[name][fault])


def targets(outcomes: Outcomes, detection_s: float = 2.0) -> list[Target]:
    ours = {fault: median_s(outcomes, "resilient", fault) for fault in FAULTS}
    found = []
    for fault, value in ours.items():
        goal = 0.3 if fault in ("process killed", "host killed") else detection_s + 0.3
        found.append(Target(name=f"{fault}: stood still", value=value, unit="s", goal=goal))
    for change in ("node joins", "node drained"):
        (one,) = outcomes["resilient"][change]
        found.append(Target(name=f"{change}: steps lost", value=one["steps_lost"], unit="", goal=1.0))
        recomputed = one["recomputed_samples"]
        found.append(Target(name=f"{change}: samples computed again", value=recomputed, unit="", goal=0.0))
    for name in (name for name in outcomes if name != "resilient"):
        for fault in outcomes[name]:
            ratio = median_s(outcomes, name, fault) / max(ours[fault], 1e-3)
            goal = 10.0 if fault == "process killed" and name in DEFAULTS else 1.0
            found.append(Target(name=f"{fault}: {name} / ours", value=ratio, unit="x", goal=goal, at_least=True))
    return found
