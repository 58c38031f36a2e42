"""The controller's dealings with the keepers about snapshots: who protects whom, and what they hold.

Levels, not messages: rings and addresses are told again from time to time, a keeper that takes another's place is
asked what that one was asked, and a question that is not answered in time counts as answered by those who did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from actors.keeper import KeeperAnswer
from actors.vault import Ring
from snapshot.core.election import Elected
from snapshot.core.stripes import groups

from .core.events import Event, ImagesDecoded, InventoryTaken
from .core.plan import Address, Plan


def rings(plan: Plan, parity: int, domains: Mapping[str, str]) -> dict[str, Ring]:
    """For each node of the plan the group that its keeper belongs to. `domains`: failure domains by node."""
    shares: dict[str, list[int]] = {}
    for rank, place in enumerate(plan.places):
        shares.setdefault(place.node, []).append(rank)
    return {
        node: Ring(
            generation=plan.generation,
            group=group,
            shares={member: tuple(shares[member]) for member in group.nodes},
            branches=plan.branches,
        )
        for group in groups([(node, domains.get(node, node)) for node in shares], parity)
        for node in group.nodes
    }


@dataclass(slots=True)
class _Question:
    asked: int
    phase: str
    ask: Callable[[Any], None]
    expected: set[str]
    deadline: float
    without_keeper: set[str] = field(default_factory=set)
    """Nodes that the cluster lists as alive, where none runs at the moment."""
    asked_of: dict[str, Any] = field(default_factory=dict)
    """By node, the keeper that it was put to last."""
    answers: dict[str, KeeperAnswer] = field(default_factory=dict)

    def put(self, node: str, keeper: Any) -> None:
        """Once to each keeper."""
        if self.asked_of.get(node) is not keeper:
            self.asked_of[node] = keeper
            self.ask(keeper)


@dataclass(slots=True)
class Protection:
    parity: int
    addresses: dict[str, tuple[str, int]] = field(default_factory=dict)
    """Where each keeper's vault listens."""
    _rings: dict[str, Ring] = field(default_factory=dict)
    _question: _Question | None = None
    _elected: Elected | None = None

    def planned(self, plan: Plan, domains: Mapping[str, str], keepers: Mapping[str, Any]) -> None:
        self._rings = rings(plan, self.parity, domains)
        self.tell(keepers)

    def heard(self, node: str, address: tuple[str, int] | None, keepers: Mapping[str, Any]) -> None:
        """A heartbeat, with where its vault listens. A new keeper is asked what the one before it was asked."""
        if address is not None and self.addresses.get(node) != address:
            self.addresses[node] = address
            self.tell(keepers)
        question = self._question
        if question is not None and node in question.expected - question.answers.keys():
            question.put(node, keepers[node])

    def forget(self, node: str) -> None:
        self.addresses.pop(node, None)
        if self._question is not None:
            self._question.expected.discard(node)

    def tell(self, keepers: Mapping[str, Any]) -> None:
        """Every keeper of the plan: its group, and where the others listen."""
        for node, ring in self._rings.items():
            if node in keepers:
                peers = {peer: self.addresses[peer] for peer in ring.group.nodes if peer in self.addresses}
                keepers[node].protect.remote(ring, peers)

    def view(self, keepers: Iterable[str]) -> dict[str, dict[str, int]]:
        """By node: which group it is in, of how many nodes, how many of those may be lost, and how many keepers are
        there. Groups are numbered in the order of nodes."""
        alive, numbers = set(keepers), dict[tuple[str, ...], int]()
        return {
            node: {
                "group": numbers.setdefault(ring.group.nodes, len(numbers)),
                "nodes": ring.group.size,
                "parity": ring.group.parity,
                "keepers": len(alive.intersection(ring.group.nodes)),
            }
            for node, ring in sorted(self._rings.items())
        }

    # Questions

    def take_inventory(
        self, asked: int, ended: tuple[int, ...], keepers: Mapping[str, Any], nodes: Iterable[str], deadline: float
    ) -> None:
        self.tell(keepers)  # without its ring a keeper can't tell which snapshots are complete
        self._ask(
            _Question(
                asked=asked,
                phase="inventory",
                ask=lambda keeper: keeper.take_inventory.remote(asked, ended),
                expected=set(keepers),
                deadline=deadline,
                without_keeper=set(nodes) - set(keepers),
            ),
            keepers,
        )

    def rebuild(self, asked: int, elected: Elected, keepers: Mapping[str, Any], now: float, limit_s: float) -> None:
        """Decode first, everywhere; then put together."""
        self._elected = elected
        self._ask_to_rebuild("decode", asked, keepers, now, limit_s)

    def _ask_to_rebuild(self, phase: str, asked: int, keepers: Mapping[str, Any], now: float, limit_s: float) -> None:
        self._ask(
            _Question(
                asked=asked,
                phase=phase,
                ask=lambda keeper: keeper.rebuild.remote(asked, phase, self._elected, dict(self.addresses)),
                expected=set(keepers),
                deadline=now + limit_s,
            ),
            keepers,
        )

    def _ask(self, question: _Question, keepers: Mapping[str, Any]) -> None:
        self._question = question
        for node, keeper in keepers.items():
            question.put(node, keeper)

    def answered(self, answer: KeeperAnswer) -> None:
        question = self._question
        if question is not None and (answer.asked, answer.phase) == (question.asked, question.phase):
            question.answers[answer.node] = answer

    def settle(self, keepers: Mapping[str, Any], now: float, limit_s: float) -> Event | None:
        """What has come of the question, once all have answered or the time is up."""
        question = self._question
        if question is None or (not question.expected <= question.answers.keys() and now < question.deadline):
            return None
        self._question = None
        if question.phase == "inventory":
            return self._inventory_taken(question)
        failed = [answer for answer in question.answers.values() if answer.error]
        if question.phase == "decode" and not failed:
            self._ask_to_rebuild("assemble", question.asked, keepers, now, limit_s)
            return None
        return ImagesDecoded(asked=question.asked)

    def _inventory_taken(self, question: _Question) -> InventoryTaken:
        found = [answer.inventory for _, answer in sorted(question.answers.items()) if answer.inventory is not None]
        reachable = [inventory for inventory in found if inventory.keeper in self.addresses]
        return InventoryTaken(
            asked=question.asked,
            inventories=tuple(reachable),
            addresses=tuple((node, Address(host=at[0], port=at[1])) for node, at in sorted(self.addresses.items())),
            absent=_without(question.expected | question.without_keeper, (inventory.keeper for inventory in reachable)),
        )


def _without(nodes: Iterable[str], answered: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(set(nodes) - set(answered)))
