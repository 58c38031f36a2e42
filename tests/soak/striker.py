"""A thread that hits the run at random moments drawn from a seed, and then lets it come to its end."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from resilient.chaos import NotNow, Victim
from resilient.demo_cluster import LocalCluster
from resilient.faults import KINDS, Act, choose

from .loop import NODES, RANKS, tell_last_step
from .rules import LONGEST_PAUSE_S, SHORTEST_PAUSE_S, WEIGHTS, Standing, why_spared

STAND_STILL_LIMIT_S = 180.0
BEGIN_LIMIT_S = 240.0
STEPS_BEFORE_THE_END = 60
"""More than any rank can commit between two looks for the file that names the last step."""
LOOK_S = 0.05


class StoodStill(Exception):
    """The run has committed nothing for longer than anything it promises to survive may take."""


class Progress:
    """The newest news of the run, and when it last committed a step."""

    def __init__(self, told: Callable[[dict[str, Any]], None]) -> None:
        self.news: dict[str, Any] = {"step": 0, "ranks": 0, "checkpoints": {}, "recoveries": []}
        self.steps = 0
        """Committed in all, those computed again included."""
        self.moved_at = time.monotonic()
        self.longest_s = 0.0
        self._told = told
        self.error: BaseException | None = None
        """Raised in the driver's thread: the run is stopped."""

    def __call__(self, news: dict[str, Any]) -> None:
        if self.error is not None:
            raise self.error
        before, now = self.news["step"], time.monotonic()
        self.news = dict(news)
        if 0 < before < news["step"] or (before == 0 < news["step"] and not self.steps):
            self.steps += news["step"] - before
            self.longest_s = max(self.longest_s, now - self.moved_at)
            self.moved_at = now
        self._told(news)


class Striker(threading.Thread):
    """acts: all that was done. spared: how often nothing was done, by reason."""

    def __init__(
        self, *, cluster: LocalCluster, progress: Progress, run: str, seed: int, seconds: float, end: Path,
        say: Callable[[str], None],
    ) -> None:  # fmt: skip
        super().__init__(name="striker", daemon=True)
        self.acts: list[dict[str, Any]] = []
        self.spared: Counter[str] = Counter()
        self._cluster, self._progress, self._run, self._seconds = cluster, progress, run, seconds
        self._source = random.Random(seed)
        self._end, self._say = end, say
        self._nodes = NODES
        self._builder: threading.Thread | None = None
        self._unanswered = self._steps_seen = 0

    def run(self) -> None:
        try:
            with Victim(self._run, self._lose_node) as victim:
                self._begin()
                ends_at = time.monotonic() + self._seconds
                while time.monotonic() < ends_at:
                    self._pause(self._source.uniform(SHORTEST_PAUSE_S, LONGEST_PAUSE_S))
                    self._strike(victim)
            self._say("no more faults; the run is to come to its end")
            if self._builder is not None:
                self._builder.join()
            steps = self._progress.steps
            self._wait(lambda: self._progress.steps >= steps + 5)
            tell_last_step(self._end, self._progress.news["step"] + STEPS_BEFORE_THE_END)
        except BaseException as error:  # noqa: BLE001  the thread's edge: the driver's thread raises it
            self._progress.error = error

    def _begin(self) -> None:
        def ready() -> bool:
            news = self._progress.news
            return bool(news["ranks"] == RANKS and news["checkpoints"].get("durable", -1) >= 0)

        deadline = time.monotonic() + BEGIN_LIMIT_S
        while not ready():
            if time.monotonic() > deadline:
                raise StoodStill(f"{RANKS} ranks and a checkpoint have not come within {BEGIN_LIMIT_S:.0f} s")
            time.sleep(LOOK_S)
        self._say(f"{RANKS} ranks train, a checkpoint is durable: faults begin")

    def _strike(self, victim: Victim) -> None:
        if self._progress.steps > self._steps_seen:
            self._unanswered, self._steps_seen = 0, self._progress.steps
        standing = Standing(nodes=self._nodes, unanswered=self._unanswered, durable=True)
        try:
            seen = victim.look()
            # The head's lives as long as the run: a witness of what grows.
            keepers = tuple(node for node in seen.keepers if node != self._cluster.head)
            act = choose(replace(seen, keepers=keepers), KINDS, self._source, WEIGHTS)
            if act is None:
                raise NotNow("there is nothing to do it to")
            if why := why_spared(act, standing):
                self.spared[why] += 1
                return
            step = self._progress.news["step"]
            self._done(act, step, victim.do(act))
        except NotNow as why:
            self._say(f"not now: {why}")
            self.spared["not possible at that moment"] += 1

    def _done(self, act: Act, step: int, what: str) -> None:
        self._unanswered += 1
        self.acts.append({"at": time.strftime("%H:%M:%S"), "kind": act.kind, "step": step, "target": act.target})
        self._say(f"step {step}: {act.kind}: {act.target}: {what}")

    def _lose_node(self, node: str) -> int:
        count = self._cluster.lose_node(node)
        self._nodes -= 1
        self._builder = threading.Thread(target=self._add_node, name="builder", daemon=True)
        self._builder.start()
        return count

    def _add_node(self) -> None:
        try:
            node = self._cluster.add_node()
        except Exception as error:  # noqa: BLE001  all that Ray raises is a plain Exception; the run goes on with fewer
            self._say(f"no new node: {error}")
            return
        self._nodes += 1
        self._say(f"node {node[:8]} has joined the cluster")

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        self._wait(lambda: time.monotonic() >= until)

    def _wait(self, true: Callable[[], bool]) -> None:
        while not true():
            still_s = time.monotonic() - self._progress.moved_at
            if still_s > STAND_STILL_LIMIT_S:
                raise StoodStill(f"no step was committed for {still_s:.0f} s")
            time.sleep(LOOK_S)
