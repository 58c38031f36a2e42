"""The processes of an attempt, as the controller holds them: one keeper per node, and the ranks.

Carries out what was decided, and repeats it where a message may be lost. It decides one thing by itself:
a keeper that died alone is replaced; its node's ranks go on.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable
from typing import Any

from actors import launch
from actors.keeper import KeeperSpec
from actors.rank import RankSpec

from .checkpoints import save_spec
from .job import Job
from .worker import RankBody


class Workers:
    def __init__(self, job: Job, controller: Any) -> None:
        self._job = job
        self._controller = controller
        self.ranks: dict[int, Any] = {}
        self.keepers: dict[str, Any] = {}
        self._incarnations: dict[str, int] = {}
        """Which keeper of a node is the present one."""
        self._closed: dict[str, set[tuple[str, int]]] = {}
        """Closed lifelines by node."""
        self._keeper_lost_at: dict[str, float] = {}
        """Nodes whose keeper has ended, while not all of their ranks have."""
        self._doomed: dict[int, str] = {}
        """Members to be killed whose end no keeper has confirmed yet, with their nodes."""

    # Ranks

    def spawn(self, member: int, node: str) -> bool:
        """False, and nothing started, if another controller has used this number."""
        settings, key = self._job.settings, self._job.key
        if not launch.create_key(f"{key}/rank/{member:09d}", node.encode()):
            return False
        spec = RankSpec(
            key=key,
            member=member,
            node=node,
            folder=self._folder(node),
            secret=self._job.secret,
            lease_s=settings.lease_s,
        )
        self.ranks[member] = launch.start_rank(
            spec,
            resources=dict(settings.resources),
            controller=self._controller,
            keeper=self.keepers[node],
            make_body=functools.partial(RankBody, self._job),
        )
        return True

    def _folder(self, node: str) -> str:
        snapshot = self._job.settings.snapshot
        return launch.folder_of(self._job.key, node, snapshot.directory if snapshot else launch.MEMORY)

    def kill(self, member: int, node: str) -> None:
        self._doomed[member] = node
        if node in self.keepers:
            self.keepers[node].kill.remote(member)
        if member in self.ranks:
            launch.end(self.ranks.pop(member))

    def confirmed_dead(self, members: Iterable[int]) -> None:
        for member in members:
            self._doomed.pop(member, None)

    # Keepers

    def incarnation(self, node: str) -> int:
        return self._incarnations[node]

    def is_present(self, node: str, incarnation: int) -> bool:
        return node in self.keepers and self._incarnations.get(node) == incarnation

    def start_keeper(self, node: str) -> None:
        settings, key = self._job.settings, self._job.key
        checkpoint = settings.checkpoint
        incarnation = max(time.time_ns() // 1_000_000, self._incarnations.get(node, 0) + 1)
        spec = KeeperSpec(
            key=key,
            node=node,
            folder=self._folder(node),
            secret=self._job.secret,
            incarnation=incarnation,
            beat_s=settings.detection_s / 8,
            lease_s=settings.lease_s,
            snapshots=settings.snapshot is not None,
            linger_s=settings.snapshot.linger_s if settings.snapshot else 0.0,
            save=save_spec(checkpoint, settings.name, node, self._job.secret) if checkpoint is not None else None,
        )
        self._incarnations[node] = incarnation
        # That the former one has ended says nothing more about the node: its ranks may end, and it may live.
        self._closed.get(node, set()).discard(("keeper", 0))
        self.keepers[node] = launch.start_keeper(spec, controller=self._controller)

    def heard(self, node: str) -> None:
        """Its keeper beats."""
        self._closed.get(node, set()).discard(("keeper", 0))

    def lifeline_closed(self, name: str, living: Iterable[int], now: float) -> str | None:
        """The node, if with this its keeper and all its `living` ranks have ended: they died with it."""
        kind, member, node = name.split()
        closed = self._closed.setdefault(node, set())
        closed.add((kind, int(member)))
        if ("keeper", 0) not in closed or node not in self.keepers:
            return None
        if {("rank", number) for number in living} <= closed:
            return node
        if kind == "keeper":
            self._keeper_lost_at[node] = now
        return None

    def lonely(self, now: float) -> list[str]:
        """Nodes whose keeper has ended for certain, although ranks of theirs live on."""
        settle_s = self._job.settings.limits.settle_s
        return sorted(node for node, at in self._keeper_lost_at.items() if now - at > settle_s)

    def forget_keeper(self, node: str) -> None:
        self._keeper_lost_at.pop(node, None)
        keeper = self.keepers.pop(node, None)
        if keeper is not None:
            launch.end(keeper)

    def forget_node(self, node: str) -> None:
        self.forget_keeper(node)
        self._closed.pop(node, None)
        self._doomed = {member: at for member, at in self._doomed.items() if at != node}

    # All of them

    def renew(self, lifelines: tuple[str, int], acknowledged: int) -> None:
        """The controller lives. What has to be killed is killed again, in case a keeper was away."""
        for rank in self.ranks.values():
            rank.renew.remote(lifelines, acknowledged)
        for keeper in self.keepers.values():
            keeper.renew.remote(lifelines)
        for member, node in self._doomed.items():
            if node in self.keepers:
                self.keepers[node].kill.remote(member)

    def find(self) -> dict[int, str]:
        """After a restart: take hold of what lives. All ranks on record, with their nodes."""
        prefix = f"{self._job.key}/"
        for name in launch.names(prefix):
            kind, _, rest = name.removeprefix(prefix).partition("/")
            handle = launch.find(name)
            if kind == "keeper" and handle is not None:
                node, _, incarnation = rest.partition("/")
                self.keepers[node], self._incarnations[node] = handle, int(incarnation)
            elif kind == "rank" and handle is not None:
                self.ranks[int(rest)] = handle
        return {
            int(key.rpartition("/")[2]): (launch.read_key(key) or b"").decode()
            for key in launch.list_keys(f"{prefix}rank/")
        }

    def end(self, *, linger: bool) -> None:
        """End every process; keepers a while later, if they are to linger. Ranks may end by themselves first:
        then Ray reports no failure of theirs."""
        patience_s = self._job.settings.detection_s / 2
        for rank in self.ranks.values():
            launch.end(rank)
        if linger:
            launch.wait([keeper.linger.remote() for keeper in self.keepers.values()], patience_s)
            return
        launch.wait([keeper.clean_up.remote(patience_s) for keeper in self.keepers.values()], 2 * patience_s + 1.0)
        for keeper in self.keepers.values():
            launch.end(keeper)
