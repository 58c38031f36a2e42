"""A whole cluster in one process: one seed decides every delay, loss and fault.

First phase: anything may fail. Second phase: nothing fails any more, enough nodes exist, messages
get through, and the run must end. Time is simulated; the real core runs inside (`Seat` in every rank,
`Control` and `Detector` in every controller), and everything around it is modelled in rank.py,
group.py, keeper.py and shell.py. The checkers look at every fact as it happens.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter, deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from resilient.core.instructions import End
from resilient.core.plan import Plan
from snapshot.core.inventory import SnapshotKey

from .checkers import Checker, Violation, all_checkers
from .drains import Drains
from .flips import Flips
from .group import Group
from .keeper import Keeper
from .memory import Memory
from .protected import Protected
from .rank import Rank
from .setting import Setting
from .shell import Shell
from .silent import SilentLinks
from .speeds import Speeds
from .stages import teams
from .storage import Storage

MOST_EVENTS = 200_000
LIVENESS_S = 90.0
"""How long the second phase may take: a few detections, starts and whole runs."""


@dataclass(slots=True)
class Node:
    name: str
    capacity: int
    alive: bool = True
    silent_until: float = 0.0
    """Until then nothing passes between its keeper and the controllers, though its ranks live on."""
    beats: int = 0
    let_go: bool = False
    """Drained: nothing of the run is on it any more."""
    memory: Memory = field(init=False)
    keeper: Keeper | None = None
    damaged: set[SnapshotKey] = field(default_factory=set)
    """Snapshots of which something has rotted here."""

    def __post_init__(self) -> None:
        self.memory = Memory(self.name)


@dataclass
class World:
    seed: int
    keep_story: bool = False
    now: float = 0.0
    healing: bool = False
    """Whether the second phase has begun."""
    nodes: dict[str, Node] = field(default_factory=dict)
    ranks: dict[int, Rank] = field(default_factory=dict)
    groups: dict[int, Group] = field(default_factory=dict)
    shells: list[Shell] = field(default_factory=list)
    plans_on_record: dict[int, Plan] = field(default_factory=dict)
    spawned_on_record: dict[int, str] = field(default_factory=dict)
    gone_on_record: set[int] = field(default_factory=set)
    condemned: dict[int, float] = field(default_factory=dict)
    """Members that some controller has decided to kill, and when the first one did."""
    newest_formed: int = 0
    """The truth: the newest generation that any member has seen formed."""
    seen: Counter[str] = field(default_factory=Counter)
    """How often each interesting interval was hit."""
    end: End | None = None
    ended_by: Shell | None = None
    lost_state_at: float | None = None
    drained: bool = True
    """Whether nodes and ranks may be asked to leave, or be slow; without that older seeds keep their stories."""
    staged: bool = True
    """Whether a third of the seeds train a pipeline; without that older ones keep their stories."""
    looped: bool = False
    """Whether a run without a pipeline has two loops, one after the other."""
    silenced: bool = False
    """Whether links between living nodes may fall silent."""
    disturbed: bool = False
    """Whether something has failed, other than controllers and messages."""

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        setting = Setting.drawn(self.rng).with_snapshots(random.Random(f"snapshots {self.seed}"))
        self.speeds = Speeds(self.seed, wanted=self.drained)
        self.drains = Drains(self, wanted=self.drained)
        setting = self.speeds.changed(setting)
        self.setting = setting.with_pipeline(random.Random(f"pipeline {self.seed}")) if self.staged else setting
        more = random.Random(f"loops {self.seed}")
        self.second_loop = more.randint(1, self.setting.steps - 1) if self.looped and not self.setting.pipeline else 0
        """The step with which it begins, if there is one."""
        self.records_rng = random.Random(f"records {self.seed}")
        self.silent = SilentLinks(self, wanted=self.silenced)
        self.protected = Protected(self)
        self.storage = Storage()
        self.flips = Flips(self)
        self.fault_budget = self.setting.fault_budget
        self.story: deque[str] = deque(maxlen=400)
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._sequence = 0
        self.checkers: list[Checker] = all_checkers(self)
        self._concerned: dict[str, list[Callable[..., None]]] = {}
        """By fact, those checks that look at it."""

    # Time

    def at(self, delay: float, action: Callable[[], None]) -> None:
        self._sequence += 1
        heapq.heappush(self._heap, (self.now + delay, self._sequence, action))

    def run(self) -> None:
        from .faults import Faults

        self.faults = Faults(self)
        for capacity in self.setting.nodes:
            self.add_node(capacity)
        self.start_controller()
        self.at(self.setting.fault_phase_s, self._heal)
        self.faults.begin()
        self.flips.begin()
        self.drains.begin()
        self.silent.begin()
        for _ in range(MOST_EVENTS):
            if self.end is not None or not self._heap:
                break
            self.now, _, action = heapq.heappop(self._heap)
            if self.healing and self.now > self.setting.fault_phase_s + LIVENESS_S + self.more_time_s:
                raise Violation("liveness", f"not ended after {self.now:.0f} s, the last of them without faults")
            action()
        else:
            raise Violation("liveness", f"{MOST_EVENTS} events without an end")
        self.emit("ended")

    @property
    def more_time_s(self) -> float:
        return self.speeds.more_time_s + self.silent.more_time_s

    def _heal(self) -> None:
        self.healing = True
        self.tell("--- no more faults")
        for node in self.nodes.values():
            node.silent_until = min(node.silent_until, self.now)
        wanted = self.setting.limits.max_workers + self.setting.limits.spares
        while sum(node.capacity for name, node in self.nodes.items() if self._may_hold_ranks(name)) < wanted:
            self.add_node(2)
        while len(living := [shell for shell in self.shells if shell.alive]) > 1:
            living[0].die()
        if not living:
            self.start_controller()

    def _may_hold_ranks(self, name: str) -> bool:
        return self.nodes[name].alive and name not in self.drains.nodes and name not in self.silent.cut_for_good()

    # Facts

    def tell(self, text: str) -> None:
        if self.keep_story:
            self.story.append(f"{self.now:8.3f}  {text}")

    def emit(self, what: str, **facts: Any) -> None:
        if what not in self._concerned:
            found = (getattr(checker, f"on_{what}", None) for checker in self.checkers)
            self._concerned[what] = [check for check in found if check is not None]
        for check in self._concerned[what]:
            check(**facts)

    def add_node(self, capacity: int) -> None:
        name = f"node{len(self.nodes) + 1}"
        node = self.nodes[name] = Node(name, capacity)
        if self.setting.limits.snapshots:
            node.keeper = Keeper(self, node.memory, 1)
        self.tell(f"{name} comes, room for {capacity}")
        self.at(0.0, lambda: self._beat(name))

    def _beat(self, name: str) -> None:
        """The keeper of a node shows its ranks to the controllers."""
        node = self.nodes[name]
        if not node.alive or node.let_go:
            return
        node.beats += 1
        keeper = node.keeper
        if self.now >= node.silent_until and (keeper is None or keeper.alive):
            vitals = tuple(
                rank.vital() for _, rank in sorted(self.ranks.items()) if rank.node == name and not rank.forgotten
            )
            for shell in self.shells:
                if shell.alive:
                    self.at(self.delay(), lambda shell=shell, beat=node.beats: shell.beat(name, beat, keeper, vitals))
        self.at(0.4, lambda: self._beat(name))

    # Messages: delayed, lost, doubled, reordered

    def delay(self) -> float:
        if not self.healing and self.rng.random() < 0.03:
            return self.rng.uniform(0.3, 2.0)
        return self.rng.uniform(0.001, self.setting.slowness)

    def message(self, deliver: Callable[[], None]) -> None:
        if not self.healing and self.rng.random() < self.setting.loss:
            return
        self.at(self.delay(), deliver)
        if not self.healing and self.rng.random() < 0.05:
            self.at(self.delay(), deliver)

    def to_controllers(self, node: str, deliver: Callable[[Shell], None]) -> None:
        if self.now < self.nodes[node].silent_until:
            return
        for shell in self.shells:
            if shell.alive:
                self.message(lambda shell=shell: deliver(shell))

    # Processes

    def start_controller(self) -> None:
        shell = Shell(self, len(self.shells) + 1)
        self.shells.append(shell)
        if sum(shell.alive for shell in self.shells) > 1:
            self.seen["two controllers"] += 1
            self.disturbed = True  # one may let ranks go that the other has just seated
        shell.begin()
        self.drains.notices(shell)

    def controller_died(self) -> None:
        def restart() -> None:
            if not any(shell.alive for shell in self.shells):
                self.start_controller()

        self.at(self.rng.uniform(0.3, 3.0), restart)

    def start_rank(self, member: int, node: str) -> bool:
        if not self.nodes[node].alive or member in self.ranks or member in self.drains.released:
            return False
        self.emit("started", name=node)
        self.ranks[member] = Rank(self, member, node)
        self.ranks[member].begin()
        return True

    def kill_rank(self, member: int, why: str) -> None:
        rank = self.ranks.get(member)
        if rank is None or not rank.alive:
            return
        self.tell(f"rank {member} dies: {why}")
        self.disturbed = self.disturbed or member not in self.drains.released
        rank.alive = False
        for _, group in sorted(self.groups.items()):
            group.member_died(member)
        self.look_for_state()

    def kill_node(self, name: str) -> None:
        self.tell(f"{name} dies")
        node = self.nodes[name]
        node.alive = False
        if node.keeper is not None:
            node.keeper.alive = False
        for member, rank in sorted(self.ranks.items()):
            if rank.node == name:
                self.kill_rank(member, f"{name} died")
        for shell in self.shells:
            if shell.alive and self.rng.random() < 0.5:
                self.at(self.rng.uniform(0.01, 0.5), lambda shell=shell: shell.node_ended(name))

    def keeper_of(self, name: str) -> Keeper | None:
        """The keeper that runs on this node now."""
        keeper = self.nodes[name].keeper
        return keeper if keeper is not None and keeper.alive else None

    def kill_keeper(self, name: str) -> None:
        """Its process only: what it kept stays, and is taken over by another one."""
        node = self.nodes[name]
        assert node.keeper is not None
        self.tell(f"the keeper of {name} dies")
        keeper = node.keeper
        keeper.alive = False
        for shell in self.shells:
            self.at(self.rng.uniform(0.01, 0.5), lambda shell=shell: shell.keeper_ended(name, keeper))

        def take_over() -> None:
            if node.alive and not node.let_go:
                self.tell(f"another keeper takes over on {name}")
                node.keeper = Keeper(self, node.memory, keeper.incarnation + 1)

        self.at(self.rng.uniform(0.7, 3.5), take_over)

    def look_for_state(self) -> None:
        if self.lost_state_at is None and self.plans_on_record and not self.state_is_held():
            self.lost_state_at = self.now

    def keepers_of_state(self) -> list[int]:
        """Who holds the state and will go on: living, running, uncondemned members of the newest generation."""
        if not self.newest_formed:
            return []
        return [
            member
            for member in self.plans_on_record[self.newest_formed].members
            if (rank := self.ranks.get(member)) is not None
            and rank.alive
            and not rank.stopped
            and self.now >= self.nodes[rank.node].silent_until
            and rank.seat.formed == self.newest_formed
            and not rank.seat.restoring
            and member not in self.condemned
        ]

    def state_is_held(self, without: Collection[int] = ()) -> bool:
        """By those who will go on, other than these: in a pipeline by somebody of every stage."""
        held = set(self.keepers_of_state()) - set(without)
        newest = self.plans_on_record.get(self.newest_formed)
        return newest is not None and all(held.intersection(team) for team in teams(newest))

    def group_of(self, plan: Plan) -> Group:
        return self.groups.setdefault(plan.generation, Group(self, plan))

    def finish(self, end: End, shell: Shell) -> None:
        self.end, self.ended_by = end, shell
        self.tell(f"END {end.outcome}: {end.reason}")
