"""`resilient drain`: have the runs of a cluster leave a node, and wait until nothing of them is on it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError

from actors import launch

from .status import ANSWER_LIMIT_S, controllers, in_words

LOOK_EVERY_S = 0.5
STUCK_LOOKS = 4
"""So often in a row a node has to be seen unable to leave until that is believed: nodes may just be coming."""


def node_named(asked: str, nodes: Sequence[Mapping[str, Any]]) -> str:
    """The id of the live node with this id, beginning of an id, or IP address. ValueError if that is not one node."""
    living = [node for node in nodes if node["Alive"]]
    found = [node for node in living if node["NodeID"].startswith(asked) or node["NodeManagerAddress"] == asked]
    if len(found) != 1 or not asked:
        known = ", ".join(f"{node['NodeID'][:8]} ({node['NodeManagerAddress']})" for node in found or living)
        what = "is several nodes" if len(found) > 1 else "is none of the live nodes"
        raise ValueError(f"node {asked!r}: {what}: {known}")
    name: str = found[0]["NodeID"]
    return name


@dataclass(slots=True, kw_only=True)
class Drain:
    """Of one node from one run."""

    run: str
    attempt: int
    node: str
    state: str = "leaving"
    """leaving, drained, stuck, or ended with the run."""
    why: str = ""
    _stuck: int = 0

    def look(self) -> None:
        """How it stands; asked for again if the run's controller does not know of it."""
        handle = launch.find(f"{self.run}/{self.attempt}/controller")
        if handle is None:
            self.state, self.why = "ended", "the run has ended"
            return
        try:
            self.seen(ray.get(handle.look.remote(), timeout=ANSWER_LIMIT_S), ask=lambda: handle.drain.remote(self.node))
        except (RayActorError, GetTimeoutError):
            self.why = "its controller does not answer"

    def seen(self, view: Mapping[str, Any], ask: Callable[[], object]) -> None:
        leaving = view["leaving"].get(self.node)
        if view["outcome"] is not None:
            self.state, self.why = "ended", "the run has ended"
        elif leaving is None:
            ask()
        else:
            self.why = in_words(leaving)
            self._stuck = self._stuck + 1 if leaving["stuck"] else 0
            drained = leaving["state"] == "drained"
            self.state = "drained" if drained else "stuck" if self._stuck >= STUCK_LOOKS else "leaving"

    def __str__(self) -> str:
        return f"{self.run}, attempt {self.attempt}: node {self.node[:8]}: {self.why}"


def drain(node: str, run: str | None, tell: Callable[[str], None]) -> list[Drain]:
    """From every run, or this one. Returns when each is drained, stuck or has ended; `tell` is given what changes."""
    names = launch.names(f"{run}/" if run is not None else "")
    found = [Drain(run=name, attempt=attempt, node=node) for name, attempt in controllers(names)]
    said: dict[int, str] = {}
    while any(each.state == "leaving" for each in found):
        for number, each in enumerate(found):
            if each.state == "leaving":
                each.look()
            if each.why and said.get(number) != str(each):
                said[number] = str(each)
                tell(str(each))
        time.sleep(LOOK_EVERY_S)
    return found
