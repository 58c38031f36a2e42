"""What goes wrong, and when: at random times, and with a preference at the delicate moments."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from .memory import pages

if TYPE_CHECKING:
    from .world import World


class Faults:
    def __init__(self, world: World) -> None:
        self.world, self.rng = world, world.rng
        self.starts_to_spend = 2
        """More ranks that die while they start would rightly end the run."""

    def begin(self) -> None:
        self.world.at(self.rng.uniform(0.5, 6.0), self._now_and_then)

    @property
    def may_act(self) -> bool:
        return not self.world.healing and self.world.fault_budget > 0

    def point(self, name: str, members: list[int]) -> None:
        """A delicate moment for these members: perhaps one of them, or something around them, fails."""
        rate = self.world.setting.fault_rate * (1.0 if self.world.newest_formed else 0.25)
        if self.may_act and self.rng.random() < rate:
            self.world.at(self.rng.choice([0.0, 0.001, 0.03, 0.1]), lambda: self._strike(members))

    def point_at_node(self, name: str, node: str) -> None:
        """The same around a node and its keeper."""
        members = sorted(member for member, rank in self.world.ranks.items() if rank.node == node and rank.alive)
        rate = self.world.setting.fault_rate
        if not self.may_act or self.rng.random() >= rate:
            return
        kind = self.rng.choice([self._node_by_name, self._keeper, self._rot])
        self.world.at(self.rng.choice([0.0, 0.01, 0.1]), lambda: self.may_act and kind(node))
        if members and self.rng.random() < 0.3:
            self.world.at(self.rng.choice([0.0, 0.03]), lambda: self._strike(members))

    def serving(self, server: int, receiver: int) -> None:
        """A kept result is on its way to who lacks it."""
        self.world.seen["a kept result was served"] += 1
        if self.may_act and self.rng.random() < 0.3:

            def strike() -> None:
                if self.world.ranks[server].alive and self._spares_state([server]):
                    self.world.fault_budget -= 1
                    self.world.seen["the server of a kept result died"] += 1
                    self.world.kill_rank(server, f"fault, while it served rank {receiver}")

            self.world.at(0.005, strike)

    def moving(self, members: list[int]) -> None:
        """Layers are on their way to some of these."""
        if self.may_act and self.rng.random() < 0.3:
            member = self.rng.choice(members)
            strike = self.rng.choice([self._kill, self._kill, lambda _: self._link()])
            self.world.at(self.rng.choice([0.005, 0.03, 0.1]), lambda: self.may_act and self._lives(member, strike))

    def _lives(self, member: int, strike: Callable[[int], None]) -> None:
        if self.world.ranks[member].alive:
            strike(member)

    def controller_point(self) -> None:
        if self.may_act and self.rng.random() < self.world.setting.fault_rate * 2:
            self.world.at(self.rng.choice([0.0, 0.01, 0.1]), self._controller)

    def _now_and_then(self) -> None:
        if not self.may_act:
            return
        self._strike(sorted(number for number, rank in self.world.ranks.items() if rank.alive))
        self.world.at(self.rng.uniform(0.2, 4.0), self._now_and_then)

    def _strike(self, members: list[int]) -> None:
        if not self.may_act:
            return
        kinds = (self._kill, self._stop, self._node, self._link, self._controller, self._new_node, self._silence)
        weights = (8, 3, 2, 3, 2, 2, 1)
        if self.world.setting.limits.snapshots and self.rng.random() < 0.4:
            self._strike_at_snapshots()
            return
        (fault,) = self.rng.choices(kinds, weights)
        living = [number for number in members if number in self.world.ranks and self.world.ranks[number].alive]
        if fault in (self._kill, self._stop, self._node, self._silence):
            if living:
                fault(self.rng.choice(living))
        else:
            fault()  # type: ignore[call-arg]

    def _may_end(self, victims: list[int]) -> bool:
        """Whether these may die: state is left, and not too many die before they have reached their loop."""
        starting = [number for number in victims if not self.world.ranks[number].ready]
        if len(starting) > self.starts_to_spend:
            return False
        self.starts_to_spend -= len(starting)
        return self._spares_state(victims)

    def _spares_state(self, victims: list[int]) -> bool:
        """Whether somebody who holds the state is left, or this seed is one of those that may lose it."""
        if self.world.setting.may_lose_state or not self.world.newest_formed:
            return True
        if self.world.storage.committed_at:
            return True
        if self.world.setting.limits.snapshots and self.world.protected.must_be_readable():
            return True
        return self.world.state_is_held(without=victims)

    def _spend(self) -> None:
        self.world.fault_budget -= 1

    def _kill(self, member: int) -> None:
        if self._may_end([member]):
            self._spend()
            self.world.kill_rank(member, "fault")

    def _stop(self, member: int) -> None:
        rank = self.world.ranks[member]
        if rank.stopped or not self._may_end([member]):
            return
        self._spend()
        rank.stop()
        self.world.disturbed = True
        self.world.look_for_state()
        self.world.seen["rank stopped"] += 1
        if self.rng.random() < 0.5:
            self.world.at(self.rng.uniform(0.3, 4.0), rank.go_on)

    def _node(self, member: int) -> None:
        name = self.world.ranks[member].node
        there = [number for number, rank in self.world.ranks.items() if rank.node == name]
        if self.world.nodes[name].alive and self._spares_snapshots(name) and self._may_end(there):
            self._spend()
            self.world.seen["node died"] += 1
            self.world.kill_node(name)

    def _silence(self, member: int) -> None:
        """Nothing passes between a node and the controllers, though its ranks go on with the others."""
        name = self.world.ranks[member].node
        there = [number for number, rank in self.world.ranks.items() if rank.node == name]
        if self._may_end(there):
            self._spend()
            duration = self.rng.uniform(0.5, 5.0)
            self.world.disturbed = True
            self.world.nodes[name].silent_until = self.world.now + duration
            self.world.look_for_state()
            self.world.seen["node silent"] += 1
            self.world.tell(f"{name} is silent for {duration:.1f} s")

    def _link(self) -> None:
        if self.world.groups:
            self._spend()
            self.world.groups[max(self.world.groups)].break_link()

    def _new_node(self) -> None:
        self._spend()
        self.world.add_node(self.rng.randint(1, 2))

    def _controller(self) -> None:
        self._spend()
        shell = next((shell for shell in self.world.shells if shell.alive), None)
        if shell is None:
            return
        if self.rng.random() < 0.3:
            self.world.start_controller()
            self.world.at(self.rng.uniform(0.0, 3.0), lambda: shell.alive and shell.die())
        else:
            self.world.seen["controller killed"] += 1
            shell.die()

    # Snapshots

    def _spares_snapshots(self, node: str) -> bool:
        """Whether what is protected can be read without this node, or this seed is one that may lose it."""
        protected = self.world.protected
        if self.world.setting.may_lose_state or protected.newest is None or self.world.storage.committed_at:
            return True
        return protected.must_be_readable(also_gone=node)

    def protected(self) -> None:
        """A newer snapshot is protected everywhere: the run may be thrown back to it."""
        if self.may_act and self.rng.random() < 0.5:
            self.world.at(self.rng.uniform(0.0, 1.0), self._strike_at_snapshots)

    def durable(self) -> None:
        """A checkpoint was committed: there may be nothing else left."""
        names = sorted(name for name, node in self.world.nodes.items() if node.alive)
        if self.may_act and names and self.rng.random() < 0.4:
            self.world.at(self.rng.uniform(0.0, 2.0), lambda: self._most_of_it(self.rng.choice(names)))

    def _strike_at_snapshots(self) -> None:
        if not self.may_act:
            return
        names = sorted(name for name, node in self.world.nodes.items() if node.alive)
        faults = (self._all_ranks, self._keeper, self._rot, self._ranks_and_node, self._most_of_it)
        (fault,) = self.rng.choices(faults, (4, 2, 2, 2, 4 if self.world.storage.committed_at else 0))
        fault(self.rng.choice(names)) if names else None

    def _all_ranks(self, node: str) -> bool:
        """Every rank at once, wherever it is; the keepers live on."""
        living = sorted(member for member, rank in self.world.ranks.items() if rank.alive and rank.ready)
        if not living or not self.world.newest_formed or not self._may_end(living):
            return False
        self._spend()
        self.world.seen["all ranks died at once"] += 1
        for member in living:
            self.world.kill_rank(member, "fault, all at once")
        return True

    def _ranks_and_node(self, node: str) -> None:
        """All ranks, and one node besides: what is left has to be decoded."""
        starting = [n for n, rank in self.world.ranks.items() if rank.node == node and rank.alive and not rank.ready]
        if not starting and self._spares_snapshots(node) and self._all_ranks(node):
            self.world.at(self.rng.choice([0.0, 0.3, 1.0]), lambda: self._node_by_name(node))

    def _most_of_it(self, node: str) -> None:
        """All ranks, and more nodes than parity makes up for: only storage is left."""
        if not self.may_act or not self._all_ranks(node):
            return
        self.world.seen["most of the cluster died"] += 1
        names = sorted(name for name, node in self.world.nodes.items() if node.alive)
        for name in self.rng.sample(names, self.rng.randint(1, len(names))):
            self._node_by_name(name)

    def _node_by_name(self, name: str) -> None:
        there = [n for n, rank in self.world.ranks.items() if rank.node == name and rank.alive]
        may = self.may_act and self.world.nodes[name].alive
        if may and self._spares_snapshots(name) and self._may_end(there):
            self._spend()
            self.world.seen["node died"] += 1
            self.world.kill_node(name)

    def _keeper(self, name: str) -> None:
        """Alone: where no rank lives, that would look like the death of the node."""
        node = self.world.nodes[name]
        if self.world.keeper_of(name) is None or self.world.now < node.silent_until:
            return
        if any(rank.alive and not rank.stopped for rank in self.world.ranks.values() if rank.node == name):
            self._spend()
            self.world.seen["keeper died alone"] += 1
            self.world.kill_keeper(name)

    def _rot(self, name: str) -> None:
        """A share or a parity block no longer is what it was; checksums will tell."""
        node = self.world.nodes[name]
        if not self._spares_snapshots(name):
            return
        slots = sorted(at for at, slot in node.memory.slots.items() if slot.committed)
        blocks = sorted(node.memory.parity, key=lambda at: (at[0].newness, at[1]))
        if slots and (not blocks or self.rng.random() < 0.6):
            slot = node.memory.slots[self.rng.choice(slots)]
            slot.headless = self.rng.random() < 0.3
            slot.damaged_page = self.rng.randrange(pages(slot.key, slot.rank))
            node.damaged.add(slot.key)
        elif blocks:
            at = self.rng.choice(blocks)
            node.memory.parity[at].rotten = True
            node.damaged.add(at[0])
        else:
            return
        self._spend()
        self.world.seen["something rotted"] += 1
        self.world.tell(f"something rots on {name}")
