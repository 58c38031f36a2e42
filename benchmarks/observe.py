"""What watching a run costs it: the step time while nobody watches, beside that while it is scraped and looked at.

    python -m benchmarks.observe             writes out/bench/observe.json

Twice. In one long run, watched and not watched for some seconds by turns. And in short runs by turns, of which some
serve nothing at all (observe=None): these differ from each other by more than the cost, so the first is needed.
Watched is: scraped every second, and a page open, that is a listener to all that the page is sent. Everything computes
for real, on ranks that share the machine with controller, keepers and whoever watches.
"""

from __future__ import annotations

import asyncio
import functools
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import ray
import torch
from rich.progress import Progress

import resilient
from actors import launch
from benchmarks import ray_nodes
from benchmarks.outcome import Target, write
from benchmarks.peer_rank import MICRO_BATCHES, SAMPLES, loss_of, model
from benchmarks.resilient_run import Data

OUT = Path("out/bench/observe.json")
RANKS = 2
ROUNDS = 2
WARM_UP, STEPS = 20, 200
TURNS, TURN_S = 28, 5.0
LONG_STEPS = 100_000
"""More than there is time for: the run is stopped."""
SCRAPE_EVERY_S = 1.0
LIMIT_S = 300.0


def body(run: resilient.Run, trace: str, steps: int) -> None:
    trained = model()
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3)
    run.protect(model=trained, optimizer=optimizer)
    with open(trace, "a", buffering=1) as lines:
        for x, y in run.batches(Data(), global_batch=SAMPLES, micro_batch=SAMPLES // MICRO_BATCHES, steps=steps):
            loss_of(trained, x, y).backward()
            committing = run.committing
            optimizer.step()
            optimizer.zero_grad()
            if committing and run.is_main:
                lines.write(f"{time.monotonic()}\n")


class Watchable:
    """A run in a thread, and the trace of its steps."""

    def __init__(self, name: str, trace: Path, steps: int, *, serves: bool) -> None:
        train = resilient.train(
            name=name,
            workers=RANKS,
            resources={"CPU": 1, "place": 1},
            snapshot=resilient.Snapshot(every=1, linger_s=0.0),
            observe="auto" if serves else None,
        )(body)
        self._trace, self._steps = trace, steps
        self._thread = threading.Thread(target=self._run, args=(train,), daemon=True)
        self._thread.start()
        self.controller = _until(lambda: _controller(name), "a controller")
        self._process = psutil.Process(ray.get(self.controller.process.remote()))
        _until(lambda: len(self.times()) > WARM_UP, "it trains")
        self.url = ray.get(self.controller.look.remote())["observe"]["url"]

    def _run(self, train: Any) -> None:
        with suppress(resilient.RunStopped):
            train.watched(lambda news: None, trace=str(self._trace), steps=self._steps)

    def times(self) -> list[float]:
        """When steps were committed."""
        return [float(line) for line in self._trace.read_text().splitlines()] if self._trace.exists() else []

    def controller_s(self) -> float:
        """The time that its controller has taken of a core."""
        return sum(self._process.cpu_times()[:2])

    def stop(self) -> None:
        self.controller.stop.remote("enough has been measured")

    def wait(self) -> None:
        self._thread.join(LIMIT_S)


def measured(folder: Path, number: int, *, watched: bool) -> dict[str, Any]:
    """Step times, and the share of a core that the controller took meanwhile."""
    run = Watchable(f"observe-{number}", folder / f"{number}", WARM_UP + STEPS, serves=watched)
    with watching(run.url) if watched else _nobody() as asked:
        began, cpu_s = time.monotonic(), run.controller_s()
        _until(lambda: len(run.times()) >= WARM_UP + STEPS - 1, "all steps")
        share = (run.controller_s() - cpu_s) / (time.monotonic() - began)
    run.wait()
    steps = [after - before for before, after in pairwise(run.times())][WARM_UP:]
    return {"step_s": statistics.median(steps), "mean_s": statistics.mean(steps), "controller": share, **asked}


def by_turns(folder: Path, track: Callable[[range], Iterable[int]]) -> dict[str, list[dict[str, Any]]]:
    """One run: what is measured while it is watched, and what while it is not, turn after turn."""
    run = Watchable("observe-by-turns", folder / "by-turns", LONG_STEPS, serves=True)
    turns: list[tuple[bool, float, float, float]] = []
    for turn in track(range(TURNS)):
        watched = turn % 4 in (1, 2)
        with watching(run.url) if watched else _nobody():
            began, cpu_s = time.monotonic(), run.controller_s()
            time.sleep(TURN_S)
            ended = time.monotonic()
            turns.append((watched, began, ended, (run.controller_s() - cpu_s) / (ended - began)))
    run.stop()
    run.wait()
    rows: dict[str, list[dict[str, Any]]] = {"not watched": [], "watched": []}
    steps = list(pairwise(run.times()))
    for watched, began, ended, share in turns:
        within = [after - before for before, after in steps if began <= before and after <= ended]
        row = {"step_s": statistics.median(within), "mean_s": statistics.mean(within), "controller": share}
        rows["watched" if watched else "not watched"].append(row)
    return rows


@contextmanager
def _nobody() -> Iterator[dict[str, int]]:
    yield {}


@contextmanager
def watching(url: str) -> Iterator[dict[str, int]]:
    """Scraped every second, and one page open: how often it was answered."""
    ended, asked = threading.Event(), {"scrapes": 0, "page_messages": 0}
    thread = threading.Thread(target=lambda: asyncio.run(_watch(url, ended, asked)))
    thread.start()
    try:
        yield asked
    finally:
        ended.set()
        thread.join()


async def _watch(url: str, ended: threading.Event, asked: dict[str, int]) -> None:
    async with aiohttp.ClientSession() as session:
        tasks = [asyncio.create_task(_scrape(session, url, asked)), asyncio.create_task(_page(session, url, asked))]
        while not ended.is_set():
            await asyncio.sleep(0.1)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _scrape(session: aiohttp.ClientSession, url: str, asked: dict[str, int]) -> None:
    while True:
        async with session.get(f"{url}metrics") as answer:
            assert "resilient_step" in await answer.text()
        asked["scrapes"] += 1
        await asyncio.sleep(SCRAPE_EVERY_S)


async def _page(session: aiohttp.ClientSession, url: str, asked: dict[str, int]) -> None:
    async with session.get(f"{url}api/events") as answer:
        async for line in answer.content:
            if line.startswith(b"data:"):
                json.loads(line.removeprefix(b"data:"))
                asked["page_messages"] += 1


def _controller(name: str) -> Any:
    found = [each for each in launch.names(f"{name}/") if each.endswith("/controller")]
    return launch.find(found[0]) if found else None


def _until(found: Any, what: str) -> Any:
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        if value := found():
            return value
        time.sleep(0.2)
    raise TimeoutError(what)


def main() -> None:
    cluster = ray_nodes.start(RANKS)
    rows: dict[str, list[dict[str, Any]]] = {"serves nothing": [], "served and watched": []}
    try:
        with tempfile.TemporaryDirectory() as folder, Progress() as progress:
            turns = by_turns(Path(folder), functools.partial(progress.track, description="turns of one run"))
            for number in progress.track(range(2 * ROUNDS), description="runs"):
                watched = number % 4 in (1, 2)  # in turns: alone, watched, watched, alone
                row = measured(Path(folder), number, watched=watched)
                rows["served and watched" if watched else "serves nothing"].append(row)
    finally:
        ray.shutdown()
        cluster.shutdown()
    rows |= turns

    def ratio(one: str, other: str) -> float:
        return statistics.median(row["mean_s"] for row in rows[one]) / statistics.median(
            row["mean_s"] for row in rows[other]
        )

    targets = [
        Target(
            name="step time, watched / not watched, in one run",
            value=ratio("watched", "not watched"),
            unit="x",
            goal=1.005,
        ),
        Target(
            name="of runs that serve and are watched / serve nothing",
            value=ratio("served and watched", "serves nothing"),
            unit="x",
            goal=1.005,
        ),
    ]
    write(OUT, targets, rows)


if __name__ == "__main__":
    main()
