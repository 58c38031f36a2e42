"""A controller's dealings with the keepers: rings are told again and again, questions are asked and collected."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from resilient.core.events import ImagesDecoded, InventoryTaken
from resilient.core.plan import Address, Plan
from snapshot.core.election import Elected
from snapshot.core.inventory import Inventory

from .memory import Ring, rings

if TYPE_CHECKING:
    from .keeper import Keeper
    from .shell import Shell

ANSWER_LIMIT_S = 10.0
TELL_AGAIN_S = 1.0
LATE_SHARE = 0.01
"""Of the answers, those that come when nobody waits for them any more."""


@dataclass(slots=True)
class _Question:
    what: str
    details: tuple[object, ...]
    expected: set[str]
    then: Callable[[_Question], None]
    put_to: dict[str, Keeper] = field(default_factory=dict)
    answers: dict[str, object] = field(default_factory=dict)


class Questions:
    def __init__(self, shell: Shell) -> None:
        self.shell, self.world = shell, shell.world
        self.absent: frozenset[str] = frozenset()
        """Whose answers were not in the last inventory."""
        self._rings: dict[str, Ring] = {}
        self._question: _Question | None = None
        self._rng = random.Random(f"late answers {self.world.seed} {shell.number}")

    # Rings

    def planned(self, plan: Plan) -> None:
        self._rings = rings(plan, self.world.setting.parity)
        self.tell()

    def tell_again(self) -> None:
        if self.shell.alive:
            self.tell()
            self.world.at(TELL_AGAIN_S, self.tell_again)

    def tell(self) -> None:
        for node, ring in self._rings.items():
            keeper = self.world.keeper_of(node)
            if keeper is not None and self.world.now >= self.world.nodes[node].silent_until:
                self.world.message(lambda keeper=keeper, ring=ring: keeper.alive and keeper.learn(ring))

    # Questions

    def forget(self, node: str) -> None:
        self.shell.keepers.discard(node)
        if self._question is not None:
            self._question.expected.discard(node)
            self._look(self._question)

    def _ask(self, what: str, then: Callable[[_Question], None], *details: object) -> None:
        """Put to all keepers; whoever does not hear it, or dies, is missing from the answers."""
        question = self._question = _Question(what, details, set(self.shell.keepers), then)
        world = self.world
        for node in sorted(question.expected):
            self._put(question, node)
        world.at(ANSWER_LIMIT_S, lambda: self._settle(question))
        world.at(0.0, lambda: self._look(question))
        world.faults.controller_point()

    def heard(self, node: str) -> None:
        """Its keeper beats: if it has taken another's place, it is asked what that one was asked."""
        question = self._question
        if question is None or node not in question.expected - question.answers.keys():
            return
        if question.put_to.get(node) is not self.world.keeper_of(node):
            self.world.seen["a keeper was asked what the one before it was asked"] += 1
            self._put(question, node)

    def _put(self, question: _Question, node: str) -> None:
        world, keeper = self.world, self.world.keeper_of(node)
        if keeper is None or world.now < world.nodes[node].silent_until:
            return
        question.put_to[node] = keeper

        late_s = ANSWER_LIMIT_S if not world.healing and self._rng.random() < LATE_SHARE else 0.0

        def answered(answer: object) -> None:
            if world.now >= world.nodes[node].silent_until:
                world.at(world.delay() + late_s, lambda: self._answered(question, node, answer))

        def put() -> None:
            if keeper.alive:
                getattr(keeper, question.what)(*question.details, answered)

        world.at(world.delay(), put)

    def _answered(self, question: _Question, node: str, answer: object) -> None:
        question.answers[node] = answer
        self._look(question)

    def _look(self, question: _Question) -> None:
        if question.expected <= set(question.answers):
            self._settle(question)

    def _settle(self, question: _Question) -> None:
        if self._question is not question or not self.shell.alive:
            return
        self._question = None
        question.then(question)

    def take_inventory(self, asked: int, ended: tuple[int, ...]) -> None:
        self.world.seen["inventory asked for"] += 1

        def then(question: _Question) -> None:
            found = [answer for _, answer in sorted(question.answers.items()) if isinstance(answer, Inventory)]
            absent = sorted(question.expected - {inventory.keeper for inventory in found})
            self.absent = frozenset(absent)
            if absent:
                self.world.seen["a keeper did not answer"] += 1
            addresses = tuple(
                (inventory.keeper, Address(host=inventory.keeper, port=keeper.incarnation))
                for inventory in found
                if (keeper := self.world.nodes[inventory.keeper].keeper) is not None
            )
            self.shell.take(
                InventoryTaken(asked=asked, inventories=tuple(found), addresses=addresses, absent=tuple(absent))
            )
            self.world.faults.controller_point()

        self._ask("take_inventory", then, ended)

    def decode(self, asked: int, elected: Elected) -> None:
        """Decode first, everywhere; then put together."""
        self.world.seen["decoding asked for"] += 1
        self.world.tell(f"controller {self.shell.number} has decoded: {elected.reason}")

        def done(question: _Question) -> None:
            self.shell.take(ImagesDecoded(asked=asked))

        def assemble(question: _Question) -> None:
            if all(question.answers.values()):
                self._ask("assemble", done, elected)
            else:
                done(question)

        self._ask("decode", assemble, elected)
        self.world.faults.point_at_node("decoding", self.world.rng.choice(sorted(self.shell.keepers)))
