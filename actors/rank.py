"""The actor that hosts one training rank.

The training function runs in a thread of its own; the actor's main thread takes in messages and never
blocks; a third thread repeats the rank's report and watches the lease. The process is never restarted:
a new incarnation gets a new number.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ray
from ray.exceptions import RayError

from .lease import Lease
from .lifeline import Lifeline
from .notice import LeaveAsked, Notice
from .priority import STARTING, raise_priority
from .processes import hold_lock
from .words import Words

REPORT_EVERY_S = 0.5
LAST_WORDS_LIMIT_S = 2.0


class Body(Protocol):
    """What runs in a rank; made in the rank's process."""

    def train(self) -> None:
        """The training thread. Reports its own end; must not raise."""

    def deliver(self, message: object) -> None:
        """A message from the controller. Quick."""

    def report(self) -> None:
        """Tell the controller how things stand."""

    def acknowledged(self, through: int) -> None:
        """The driver has all records up to this step."""

    def repeat_records(self) -> None:
        """A new controller has none of what was told to the former."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSpec:
    key: str
    """Run and attempt, as in actors' names."""
    member: int
    node: str
    folder: str
    """Where status words lie on this node."""
    secret: str
    lease_s: float


class Host:
    """What the actor offers to its body."""

    def __init__(self, spec: RankSpec, controller: Any) -> None:
        from .group_store import GroupStoreServer

        self.key = spec.key
        self.member = spec.member
        self.node = spec.node
        self.folder = Path(spec.folder)
        self.secret = spec.secret
        self.ip = ray.util.get_node_ip_address()
        self.words = Words(Path(spec.folder) / f"rank-{spec.member}.words")
        self._controller = controller
        self._store = GroupStoreServer(self.ip, spec.secret)
        self.store_port = self._store.port

    def tell(self, *messages: object) -> None:
        """Send to the controller; may be lost, so whatever matters is repeated."""
        self._controller.hear.remote(messages)

    def tell_at_last(self, *messages: object) -> None:
        """The same, before this process ends; gives up when nobody takes it in."""
        with contextlib.suppress(RayError):
            ray.get(self._controller.hear.remote(messages), timeout=LAST_WORDS_LIMIT_S)


class Rank:
    def __init__(self, spec: RankSpec, controller: Any, keeper: Any, make_body: Callable[[Host], Body]) -> None:
        raise_priority(STARTING)
        self._spec = spec
        self._controller = controller
        self._notice = Notice(self._ask_to_leave)
        self._lease = Lease(spec.lease_s)
        self._lifeline = Lifeline(f"rank {spec.member} {spec.node}", spec.secret)
        ray.get(keeper.watch.remote(spec.member, os.getpid()))
        hold_lock(Path(spec.folder) / f"rank-{spec.member}.process")
        self._body = make_body(Host(spec, controller))
        threading.Thread(target=self._body.train, name="training", daemon=True).start()
        threading.Thread(target=self._control, name="control", daemon=True).start()

    def deliver(self, message: object) -> None:
        self._body.deliver(message)

    def renew(self, lifeline: tuple[str, int], acknowledged: int) -> None:
        """The controller lives, and this is where its lifelines end."""
        self._lease.renew()
        if self._lifeline.hold(lifeline):
            self._body.repeat_records()
        self._body.acknowledged(acknowledged)

    def process(self) -> int:
        return os.getpid()

    def _ask_to_leave(self, left_s: float) -> None:
        why = "its process was sent SIGTERM"
        ask = LeaveAsked(node=self._spec.node, member=self._spec.member, why=why, left_s=left_s)
        self._controller.hear.remote((ask,))

    def _control(self) -> None:
        """Ends with the process: without it the rank would not be heard, and would outlive its controller."""
        try:
            while True:
                time.sleep(REPORT_EVERY_S)
                if self._lease.expired():
                    os._exit(0)
                self._body.report()
        except Exception:  # noqa: BLE001  the thread's edge: another rank takes its place
            traceback.print_exc()
            os._exit(1)
