"""What goes wrong, and when: at random times, and with a preference at the delicate moments."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
        return bool(set(self.world.keepers_of_state()) - set(victims))

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
        self.world.look_for_state()
        self.world.seen["rank stopped"] += 1
        if self.rng.random() < 0.5:
            self.world.at(self.rng.uniform(0.3, 4.0), rank.go_on)

    def _node(self, member: int) -> None:
        name = self.world.ranks[member].node
        there = [number for number, rank in self.world.ranks.items() if rank.node == name]
        if self.world.nodes[name].alive and self._may_end(there):
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
