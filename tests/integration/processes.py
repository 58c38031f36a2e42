"""Finding and killing the real processes of a run, from outside of it."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import ray

from actors import launch


def until(true: Callable[[], Any], what: str, limit_s: float = 180.0) -> Any:
    """Poll until something holds; its value."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if value := true():
            return value
        threading.Event().wait(0.05)
    raise AssertionError(f"not within {limit_s} s: {what}")


def disturbances(recoveries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without dealings by measured speed: where the machine slows some ranks for long, these may come at any time."""
    return [item for item in recoveries if item["kind"] != "dealt anew"]


class Watched:
    """A run in a thread of its own, so that the test can do things to it."""

    def __init__(self, function: Any, **kwargs: Any) -> None:
        self._hold = kwargs.get("hold", "")
        self.name = function.settings.name
        self.news: dict[str, Any] = {"step": 0, "generation": 0, "ranks": 0, "messages": [], "recoveries": []}
        self.news["checkpoints"] = {}
        self._result: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(function, kwargs), daemon=True)
        self._thread.start()

    def _run(self, function: Any, kwargs: dict[str, Any]) -> None:
        try:
            self._result = function.watched(self.news.update, **kwargs)
        except BaseException as error:  # noqa: BLE001  handed to the test's thread
            self._error = error

    def until(self, true: Callable[[dict[str, Any]], Any], what: str) -> None:
        """Until something holds of the run's news; an error of the run's own is raised at once."""

        def holds() -> bool:
            if self._error is not None:
                raise self._error
            return bool(true(self.news))

        until(holds, f"{what}: {self.news}")

    def at_step(self, step: int, ranks: int = 0) -> None:
        """Until the run has committed so many steps (and has so many ranks)."""
        self.until(lambda news: news["step"] >= step and news["ranks"] >= ranks, f"step {step} with {ranks} ranks")

    def until_said(self, text: str) -> None:
        self.until(lambda news: any(text in line for line in news["messages"]), f"it says {text!r}")

    def until_recovered(self, times: int, ranks: int = 0) -> None:
        """Until so many recoveries have been recorded (and the run has so many ranks)."""
        self.until(
            lambda news: len(disturbances(news["recoveries"])) >= times and news["ranks"] >= ranks,
            f"{times} recoveries, {ranks} ranks",
        )

    def result(self, limit_s: float = 180.0) -> Any:
        """Let it go at full speed, and wait for its end."""
        if self._hold:
            Path(self._hold).touch()
        self._thread.join(limit_s)
        if self._error is not None:
            raise self._error
        assert not self._thread.is_alive(), f"the run has not ended within {limit_s} s: {self.news}"
        return self._result

    @property
    def controller(self) -> Any:
        (name,) = (name for name in launch.names(f"{self.name}/") if name.endswith("/controller"))
        return launch.find(name)

    def ranks(self) -> list[tuple[int, str]]:
        """(member, node) by rank."""
        found: list[tuple[int, str]] = ray.get(self.controller.processes.remote(), timeout=30)["ranks"]
        return found

    def ready_outside(self) -> int:
        """Processes that have reached their loop and wait there without a seat."""
        others = ray.get(self.controller.look.remote(), timeout=30)["others"]
        return sum(process["state"] == "ready" for process in others)

    def pid_of_rank(self, rank: int) -> int:
        member, _ = self.ranks()[rank]
        (name,) = (name for name in launch.names(f"{self.name}/") if name.endswith(f"/rank/{member}"))
        return int(ray.get(launch.find(name).process.remote(), timeout=30))

    def signal_rank(self, rank: int, sign: int = signal.SIGKILL) -> int:
        pid = self.pid_of_rank(rank)
        os.kill(pid, sign)
        return pid

    def kill_all_ranks(self) -> None:
        """In one instant: none of them sees another one die."""
        pids = [self.pid_of_rank(rank) for rank in range(len(self.ranks()))]
        for sign in (signal.SIGSTOP, signal.SIGKILL):
            for pid in pids:
                os.kill(pid, sign)

    def until_protected(self, step: int) -> None:
        """Until the snapshot of this step, or a later one, is protected everywhere."""
        self.until(lambda news: news["snapshots"].get("protected", -1) >= step, f"step {step} is protected")

    def keeper_names(self, node: str) -> list[str]:
        """Actors that are, or were until just now, the node's keeper."""
        return launch.names(f"{self.name}/1/keeper/{node}/")

    def kill_keeper(self, node: str) -> str:
        """The name of the one that was killed."""
        (name,) = self.keeper_names(node)
        os.kill(ray.get(launch.find(name).process.remote(), timeout=30), signal.SIGKILL)
        return name

    def kill_controller(self) -> None:
        os.kill(ray.get(self.controller.process.remote(), timeout=30), signal.SIGKILL)


def is_training(pid: int) -> bool:
    """Whether this is a rank or a keeper."""
    try:
        title = " ".join(psutil.Process(pid).cmdline())
    except psutil.NoSuchProcess:
        return False
    return title.startswith("ray::") and any(name in title for name in ("Rank", "Keeper"))


drivers: list[subprocess.Popen[str]] = []
"""Those that tests have started."""


def end_what_goes_on(limit_s: float) -> list[str]:
    """End drivers, and all processes of runs that still train after the limit; which runs those were."""

    def training() -> set[str]:
        return {name.partition("/")[0] for name in launch.names("") if "/rank/" in name}

    deadline = time.monotonic() + limit_s
    while training() and time.monotonic() < deadline:
        threading.Event().wait(0.1)
    left = sorted(training())
    for driver in drivers:
        driver.kill()
        driver.communicate()
    drivers.clear()
    for run in left:
        for kind in ("controller", "keeper", "rank"):  # in this order: nobody is to replace what ends
            for name in (name for name in launch.names(f"{run}/") if f"/{kind}" in name):
                launch.end(launch.find(name))
    return left


def left_behind(name: str) -> list[str]:
    """What a run of this name still has: actors, files in shared memory."""
    files = [str(path) for path in Path(launch.FOLDER).glob(f"{name}-*")]
    return [*launch.names(f"{name}/"), *files]
