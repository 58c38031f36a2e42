"""What happens to the demo's run: a process is killed, a machine disappears, a machine arrives.

A thread beside the driver watches the run and strikes at a moment drawn from a seed, within a step.
"""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from actors.processes import opened_pid

from .demo_cluster import LocalCluster
from .demo_result import unanswered

ANSWER_LIMIT_S = 30.0
KILL_AT, LOSE_NODE_AT, ADD_NODE_AT = 0.2, 0.46, 0.54
"""Parts of the run after which each happens, if the run has recovered from what came before."""
SLOW_FROM = 0.9
"""Part of the run after which it is slowed down until everything has happened to it."""
SLOW_STEP_S = 2.0


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Gives failures the time to happen on a fast machine: steps take a while, without other effect."""

    steps: int
    step_s: float
    all_has_happened: str
    """A file that exists from then on."""
    _before: list[float] = field(default_factory=list)

    def __call__(self, step: int, loss: float) -> None:
        late = step >= SLOW_FROM * self.steps and not Path(self.all_has_happened).exists()
        now = time.monotonic()
        due = self._before[-1] + (SLOW_STEP_S if late else self.step_s) if self._before else now
        time.sleep(max(0.0, due - now))
        self._before[:] = [time.monotonic()]


class RunEnded(Exception):
    """The run has ended before all that was planned had happened to it."""


class Watch:
    """The newest news of the run, for other threads to wait on."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._news: dict[str, Any] = {"step": 0, "ranks": 0, "recoveries": []}
        self._began: tuple[int, float] | None = None
        self.step_s = 0.0
        """Mean duration of a step so far."""
        self.ended = False

    def update(self, news: dict[str, Any]) -> None:
        with self._changed:
            step, now = news["step"], time.monotonic()
            if self._began is None and step:
                self._began = step, now
            elif self._began is not None and step > self._began[0]:
                self.step_s = (now - self._began[1]) / (step - self._began[0])
            self._news = dict(news)
            self._changed.notify_all()

    def end(self) -> None:
        with self._changed:
            self.ended = True
            self._changed.notify_all()

    def until(self, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Blocks until the news is so; returns it. Raises RunEnded."""
        with self._changed:
            while not condition(self._news):
                if self.ended:
                    raise RunEnded
                self._changed.wait(1.0)
            return self._news


class Chaos(threading.Thread):
    """Does it, and remembers what it did. `error` says what went wrong in this thread itself."""

    def __init__(
        self,
        cluster: LocalCluster,
        watch: Watch,
        *,
        run: str,
        ranks: int,
        steps: int,
        seed: int,
        say: Callable[[str], None],
        all_has_happened: Path,
    ) -> None:
        super().__init__(name="chaos", daemon=True)
        self.events: list[dict[str, Any]] = []
        self.error: BaseException | None = None
        self._cluster = cluster
        self._watch = watch
        self._run = run
        self._ranks = ranks
        self._steps = steps
        self._random = random.Random(seed)
        self._say = say
        self._all_has_happened = all_has_happened

    def run(self) -> None:
        try:
            self._kill_rank()
            self._until_recovered(1, self._ranks)
            self._lose_node()
            self._until_recovered(2, self._ranks - 1)
            self._add_node()
            self._until_recovered(3, self._ranks)
            self._all_has_happened.touch()
        except BaseException as error:  # noqa: BLE001 the thread's edge: the demo says what it was
            self.error = error

    def _kill_rank(self) -> None:
        self._watch.until(lambda news: news["step"] >= 2)
        rank, (member, node) = self._random.choice(list(enumerate(self._seated())))
        pid = self._ask(f"rank/{member}", "process")
        with opened_pid(pid) as process:
            step = self._within_step(KILL_AT)
            if process is not None:
                process.send(signal.SIGKILL)
        self._done("kill", step, node, f"SIGKILL to rank {rank} (process {pid})", member=member, pid=pid)

    def _lose_node(self) -> None:
        nodes = [node for _, node in self._seated() if node != self._cluster.head]
        node = self._random.choice(nodes)
        step = self._within_step(LOSE_NODE_AT)
        count = self._cluster.lose_node(node)
        self._done("node loss", step, node, f"node {node[:8]} has disappeared: SIGKILL to all its {count} processes")

    def _add_node(self) -> None:
        step = self._within_step(ADD_NODE_AT)
        self._say("a new node is starting")
        node = self._cluster.add_node()
        self._done("join", step, node, f"node {node[:8]} has joined the cluster")

    def _until_recovered(self, times: int, ranks: int) -> None:
        """All that was done has been answered, and so many ranks train."""
        assert len(self.events) == times, self.events

        def recovered(news: dict[str, Any]) -> bool:
            recoveries = news["recoveries"]
            return not unanswered(self.events, recoveries) and bool(recoveries[-1]["ranks"] == ranks)

        self._watch.until(recovered)

    def _within_step(self, part: float) -> int:
        """Returns at a random moment of the first step after this part of the run."""
        first = int(part * self._steps)
        step = int(self._watch.until(lambda news: news["step"] >= first)["step"])
        step = int(self._watch.until(lambda news: news["step"] > step)["step"])
        time.sleep(self._random.uniform(0.0, 0.9) * self._watch.step_s)
        return step

    def _done(self, kind: str, step: int, node: str, text: str, **more: Any) -> None:
        self.events.append({"kind": kind, "step": step, "node": node, **more})
        self._say(f"step {step}: {text}")

    def _seated(self) -> list[tuple[int, str]]:
        """Member and node of each rank."""
        ranks: list[tuple[int, str]] = self._ask("controller", "processes")["ranks"]
        return ranks

    def _ask(self, actor: str, method: str) -> Any:
        import ray

        from actors.launch import find

        handle = find(f"{self._run}/{actor}")
        if handle is None:
            raise RunEnded
        return ray.get(getattr(handle, method).remote(), timeout=ANSWER_LIMIT_S)
