"""Who is asked to leave, and when: nodes by a notice of the cluster, single ranks by a signal; in time, or too late.

All randomness is of its own: where nothing is drained, a seed's story is what it would be without this file.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from resilient.core.events import NodeDrained, NodeLeaving, RankLeaving
from resilient.core.plan import Plan

from .memory import Memory

if TYPE_CHECKING:
    from .rank import Rank
    from .shell import Shell
    from .world import World

NOTICED_EVERY_S = 1.0
FOREVER = float("inf")


class Drains:
    def __init__(self, world: World, *, wanted: bool) -> None:
        self.world = world
        self.rng = random.Random(f"drain {world.seed}")
        self.active = wanted and self.rng.random() < 0.5
        self.nodes: dict[str, float] = {}
        """Those that were asked to leave, and until when each lives."""
        self.ranks: dict[int, float] = {}
        self.released: set[int] = set()
        """Members that some controller has let go as not needed any more."""

    def begin(self) -> None:
        if self.active:
            for _ in range(self.rng.choice([1, 1, 2, 3])):
                self.world.at(self.rng.uniform(1.0, self.world.setting.fault_phase_s), self._ask)

    def _ask(self) -> None:
        kind = self.rng.choice([self._a_node, self._a_node, self._a_node, self._a_rank, self._several])
        kind(self.rng.choice([FOREVER, FOREVER, 25.0, self.rng.uniform(1.0, 15.0)]))

    def _a_node(self, left_s: float) -> None:
        names = sorted(name for name, node in self.world.nodes.items() if node.alive and name not in self.nodes)
        seated = [name for name in names if any(r.node == name and r.alive for r in self.world.ranks.values())]
        if names:
            self._ask_node(self.rng.choice(seated if seated and self.rng.random() < 0.8 else names), left_s)

    def _several(self, left_s: float) -> None:
        names = sorted(name for name, node in self.world.nodes.items() if node.alive and name not in self.nodes)
        for name in self.rng.sample(names, self.rng.randint(0, len(names))):
            self._ask_node(name, left_s)

    def _ask_node(self, name: str, left_s: float) -> None:
        self.world.tell(f"{name} is asked to leave within {left_s:.1f} s")
        self.world.seen["node asked to leave"] += 1
        self.nodes[name] = self.world.now + left_s
        if left_s != FOREVER:
            self.world.at(left_s, lambda: self._node_ends(name))

    def _node_ends(self, name: str) -> None:
        world, node = self.world, self.world.nodes[name]
        there = [number for number, rank in world.ranks.items() if rank.node == name and rank.alive]
        if world.healing or not node.alive:
            return
        if node.let_go or (world.faults._spares_snapshots(name) and world.faults._may_end(there)):
            world.seen["drained node died in time" if node.let_go else "node died before it was drained"] += 1
            world.kill_node(name)

    def _a_rank(self, left_s: float) -> None:
        living = [number for number, rank in sorted(self.world.ranks.items()) if rank.alive and not rank.stopped]
        if living:
            member = self.rng.choice(living)
            self.world.tell(f"rank {member} is asked to leave within {left_s:.1f} s")
            self.world.seen["rank asked to leave"] += 1
            self.ranks[member] = self.world.now + left_s
            if left_s != FOREVER:
                self.world.at(left_s, lambda: self._rank_ends(member))

    def _rank_ends(self, member: int) -> None:
        world = self.world
        if not world.healing and world.ranks[member].alive and world.faults._may_end([member]):
            world.seen["rank ended before it was released"] += 1
            world.kill_rank(member, "its grace is over")

    # Told to controllers

    def notices(self, shell: Shell) -> None:
        """What the cluster says, and what is on record; looked at from time to time."""
        if not self.active or not shell.alive:
            return
        for name, by in sorted(self.nodes.items()):
            if by > self.world.now and self.world.nodes[name].alive:
                shell.take(NodeLeaving(node=name, why="asked to", left_s=by - self.world.now))
        self.world.at(NOTICED_EVERY_S, lambda: self.notices(shell))

    def repeated(self, rank: Rank) -> None:
        """A rank that was asked to leave says so with its reports."""
        if rank.member in self.ranks:
            leaving = RankLeaving(
                member=rank.member, why="SIGTERM", left_s=max(0.0, self.ranks[rank.member] - self.world.now)
            )
            self.world.to_controllers(rank.node, lambda shell: shell.take(leaving))

    def planned(self, shell: Shell, plan: Plan) -> None:
        """A generation is on record that leaves members of its base out, perhaps: a delicate moment."""
        base = self.world.plans_on_record.get(plan.base)
        if not self.active or base is None or plan.kind != "planned":
            return
        leavers = sorted(base.ranks.keys() - plan.ranks.keys())
        if not leavers:
            if any(number in self.ranks or self.is_leaving(number) for number in plan.members) and plan.joiners:
                self.world.seen["joined beside some that are to leave"] += 1
            return
        self.world.seen["drained generation"] += 1
        if self.world.faults.may_act and self.rng.random() < 0.3:
            victims = [self.rng.choice(leavers), self.rng.choice(leavers), self.rng.choice(plan.members)]
            victim, delay = self.rng.choice(victims), self.rng.choice([0.0, 0.05, 0.2, 0.5, 1.0])
            if self.rng.random() < 0.3:
                self.world.at(delay, lambda: shell.alive and self.world.faults.may_act and shell.die())
            else:
                self.world.at(delay, lambda: self._strike(victim))

    def is_leaving(self, member: int) -> bool:
        return self.world.ranks[member].node in self.nodes if member in self.world.ranks else False

    def _strike(self, member: int) -> None:
        if self.world.faults.may_act and self.world.ranks[member].alive:
            self.world.seen["death in the middle of a drain"] += 1
            self.world.faults._kill(member)

    # Let go

    def let_go(self, shell: Shell, name: str) -> None:
        self.world.at(self.rng.uniform(0.05, 1.0), lambda: self._let_go(shell, name))

    def _let_go(self, shell: Shell, name: str) -> None:
        node = self.world.nodes[name]
        if not shell.alive:
            return
        if not node.let_go and node.alive:
            self.world.emit("let_go", name=name)
            self.world.tell(f"the keeper of {name} is let go")
            self.world.seen["node drained"] += 1
            node.let_go, node.memory = True, Memory(name)
            for member, rank in sorted(self.world.ranks.items()):
                if rank.node == name and rank.alive:  # of another controller, perhaps, that does not rule any more
                    self.released.add(member)
                    self.world.kill_rank(member, "its keeper is let go")
            if node.keeper is not None:
                node.keeper.alive = False
        shell.forget(name)
        shell.take(NodeDrained(node=name))
