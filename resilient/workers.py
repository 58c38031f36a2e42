"""The processes of an attempt, as the controller holds them: one keeper per node, and the ranks.

Carries out what was decided, and repeats it where a message may be lost. It decides one thing by itself:
a keeper that died alone is replaced; its node's ranks go on.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from actors import launch
from actors.keeper import KeeperSpec, Pulse
from actors.rank import RankSpec

from .checkpoints import save_spec
from .errands import Errands
from .job import Job
from .worker import RankBody


class Workers:
    def __init__(self, job: Job, controller: Any, errands: Errands, never_began: Callable[[int], None]) -> None:
        """never_began: called, in any thread, with a member whose process has ended as it started."""
        self._job = job
        self._controller = controller
        self._errands = errands
        self._never_began = never_began
        self.ranks: dict[int, Any] = {}
        self.keepers: dict[str, Any] = {}
        self._incarnations: dict[str, int] = {}
        """Which keeper of a node is the present one."""
        self._closed: dict[str, set[tuple[str, int]]] = {}
        """Closed lifelines by node."""
        self._keeper_lost_at: dict[str, float] = {}
        """Nodes whose keeper has ended, while not all of their ranks have."""
        self._starting: set[str] = set()
        """Nodes whose keeper has been ordered."""
        self._started: dict[str, Any] = {}
        """The newest keeper of each node; only for the thread of the errands."""
        self._over = False
        self._gone: set[int] = set()
        """Members that are on record as gone."""
        self._known_dead: dict[str, tuple[int, ...]] = {}
        """Those of them that each node's keeper has shown last as ended: it may forget them."""

    # Ranks

    def spawn(self, member: int, node: str, taken: Callable[[], None], is_gone: Callable[[int], bool]) -> None:
        """taken: called, and nothing started, if another controller has used this number. Both are called later."""
        settings, key = self._job.settings, self._job.key
        spec = RankSpec(
            key=key,
            member=member,
            node=node,
            folder=self._folder(node),
            secret=self._job.secret,
            lease_s=settings.lease_s,
        )

        creator = launch.new_creator()

        def start() -> Any:
            if self._over or not launch.create_key(f"{key}/rank/{member:09d}", node.encode(), creator):
                return None
            return launch.start_rank(
                spec,
                resources=dict(settings.resources),
                controller=self._controller,
                keeper=self._started[node],
                make_body=functools.partial(RankBody, self._job),
            )

        def started(rank: Any) -> None:
            if self._over or is_gone(member):  # its node has died before it was started
                if rank is not None:
                    launch.end(rank)
            elif rank is None:
                taken()
            else:
                self.ranks[member] = rank
                self._await_beginning(member)

        self._errands.run(start, started)

    def _await_beginning(self, member: int) -> None:
        launch.if_it_never_begins(self.ranks[member], functools.partial(self._never_began, member))

    def deliver(self, members: Iterable[int], message: object) -> None:
        """To those that have been started."""
        for member in members:
            if member in self.ranks:
                self.ranks[member].deliver.remote(message)

    def _folder(self, node: str) -> str:
        snapshot = self._job.settings.snapshot
        return launch.folder_of(self._job.key, node, snapshot.directory if snapshot else launch.MEMORY)

    def kill(self, member: int, node: str) -> None:
        if node in self.keepers:
            self.keepers[node].kill.remote(member)
        if member in self.ranks:
            launch.end(self.ranks.pop(member))
        key = f"{self._job.key}/gone/{member:09d}"
        self._errands.run(lambda: launch.write_key(key, b""), lambda _: self._gone.add(member))

    def shown(self, node: str, pulses: Iterable[Pulse], is_gone: Callable[[int], bool]) -> None:
        """A keeper's heartbeat. What was to be killed and still lives, since its keeper was away or a controller ended
        before it had said so, is killed again."""
        ended = []
        for pulse in pulses:
            if not pulse.alive:
                ended.append(pulse.member)
            elif is_gone(pulse.member):
                self.keepers[node].kill.remote(pulse.member)
        self._known_dead[node] = tuple(member for member in ended if member in self._gone)

    # Keepers

    def incarnation(self, node: str) -> int:
        return self._incarnations[node]

    def is_present(self, node: str, incarnation: int) -> bool:
        return node in self.keepers and self._incarnations.get(node) == incarnation

    def start_keeper(self, node: str) -> None:
        """Unless it has one, or one has been ordered."""
        if node in self.keepers or node in self._starting:
            return
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
        # That the former one has ended says nothing more about the node: its ranks may end, and it may live.
        self._closed.get(node, set()).discard(("keeper", 0))
        self._incarnations[node] = incarnation
        self._starting.add(node)

        def start() -> Any:
            self._started[node] = launch.start_keeper(spec, controller=self._controller)
            return self._started[node]

        def started(keeper: Any) -> None:
            if self._over:
                launch.wait([keeper.clean_up.remote()], self._job.settings.detection_s)
                launch.end(keeper)
            elif node in self._starting and self._incarnations[node] == incarnation:
                self._starting.discard(node)
                self.keepers[node] = keeper
            else:  # the node was taken for dead meanwhile
                launch.end(keeper)

        self._errands.run(start, started)

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
        self._starting.discard(node)
        keeper = self.keepers.pop(node, None)
        if keeper is not None:
            launch.end(keeper)

    def forget_node(self, node: str) -> None:
        self.forget_keeper(node)
        self._closed.pop(node, None)
        self._known_dead.pop(node, None)

    # All of them

    def renew(self, lifelines: tuple[str, int], acknowledged: int) -> None:
        """The controller lives."""
        for rank in self.ranks.values():
            rank.renew.remote(lifelines, acknowledged)
        for node, keeper in self.keepers.items():
            keeper.renew.remote(lifelines, self._known_dead.get(node, ()))

    def find(self) -> tuple[dict[int, str], set[int]]:
        """After a restart: take hold of what lives. All ranks on record, with their nodes; and those that are on
        record as gone."""
        prefix = f"{self._job.key}/"
        for name in launch.names(prefix):
            kind, _, rest = name.removeprefix(prefix).partition("/")
            handle = launch.find(name)
            if kind == "keeper" and handle is not None:
                node, _, incarnation = rest.partition("/")
                self.keepers[node], self._incarnations[node] = handle, int(incarnation)
                self._started[node] = handle
            elif kind == "rank" and handle is not None:
                self.ranks[int(rest)] = handle
        self._gone = {_member_of(key) for key in launch.list_keys(f"{prefix}gone/")}
        started = {
            _member_of(key): (launch.read_key(key) or b"").decode() for key in launch.list_keys(f"{prefix}rank/")
        }
        return started, set(self._gone)

    def taken_up(self) -> None:
        """Whatever `find` has found is known from now on: who has not begun yet may be said to have ended."""
        for member in sorted(self.ranks):
            self._await_beginning(member)

    def close(self) -> Processes:
        """All that there are, to be ended by whoever asks: nothing is started from now on. What is said to have died
        meanwhile changes nothing about them."""
        self._over = True
        patience_s = self._job.settings.detection_s / 2
        return Processes(ranks=tuple(self.ranks.values()), keepers=tuple(self.keepers.values()), patience_s=patience_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Processes:
    """A run's, as it ends."""

    ranks: tuple[Any, ...]
    keepers: tuple[Any, ...]
    patience_s: float

    def end(self, *, linger: bool) -> None:
        """End every process; keepers a while later, if they are to linger. Ranks may end by themselves first:
        then Ray reports no failure of theirs."""
        for rank in self.ranks:
            launch.end(rank)
        if linger:
            launch.wait([keeper.linger.remote() for keeper in self.keepers], self.patience_s)
            return
        launch.wait([keeper.clean_up.remote(self.patience_s) for keeper in self.keepers], 2 * self.patience_s + 1.0)
        for keeper in self.keepers:
            launch.end(keeper)


def _member_of(key: str) -> int:
    return int(key.rpartition("/")[2])
