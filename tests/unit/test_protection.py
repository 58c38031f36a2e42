"""Questions to keepers that come and go."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from actors.keeper import KeeperAnswer
from resilient.core.events import InventoryTaken
from resilient.core.plan import Address, Place, Plan
from resilient.core.planner import even_runs
from resilient.protection import Protection
from snapshot.core.inventory import Inventory

NODES, DEADLINE = "ab", 10.0


class Keeper:
    def __init__(self) -> None:
        self.asked: list[int] = []
        self.take_inventory = SimpleNamespace(remote=lambda asked, ended: self.asked.append(asked))
        self.protect = SimpleNamespace(remote=lambda ring, peers: None)


class Keepers(dict[str, Any]):
    def start(self, node: str, protection: Protection, port: int) -> None:
        self[node] = Keeper()
        protection.heard(node, ("host", port), self)

    def asked(self, node: str) -> list[int]:
        asked: list[int] = self[node].asked
        return asked


@pytest.fixture
def keepers() -> Keepers:
    return Keepers()


@pytest.fixture
def protection(keepers: Keepers) -> Protection:
    """Of a plan with a rank on each node."""
    found = Protection(parity=1)
    for port, node in enumerate(NODES):
        keepers.start(node, found, port)
    places = tuple(
        Place(member=number, node=node, address=Address(host=node, port=0)) for number, node in enumerate(NODES, 1)
    )
    found.planned(
        Plan(
            generation=1,
            base=0,
            kind="initial",
            places=places,
            leaves=even_runs(4, len(places)),
            micro_batches=4,
            joiners=(),
            reason="",
        ),
        {},
        keepers,
    )
    return found


def answer(node: str, asked: int = 1) -> KeeperAnswer:
    return KeeperAnswer(asked=asked, phase="inventory", node=node, inventory=Inventory(keeper=node))


def outcome(protection: Protection, keepers: Keepers, now: float) -> InventoryTaken | None:
    found = protection.settle(keepers, now, DEADLINE)
    assert found is None or isinstance(found, InventoryTaken)
    return found


def test_a_keeper_that_takes_another_ones_place_is_asked_what_that_one_was_asked(
    protection: Protection, keepers: Keepers
) -> None:
    protection.take_inventory(1, (), keepers, NODES, DEADLINE)
    protection.answered(answer("b"))
    protection.heard("a", ("host", 6), keepers)  # the same one, of which it was not known yet where it listens
    assert keepers.asked("a") == [1] and outcome(protection, keepers, 1.0) is None
    keepers.start("a", protection, port=7)
    keepers.start("b", protection, port=8)
    assert keepers.asked("a") == [1] and keepers.asked("b") == [], "b's has answered"
    assert outcome(protection, keepers, 2.0) is None
    protection.answered(answer("a"))
    found = outcome(protection, keepers, 3.0)
    assert found is not None and not found.absent and [each.keeper for each in found.inventories] == ["a", "b"]


def test_a_node_without_a_keeper_is_not_waited_for(protection: Protection, keepers: Keepers) -> None:
    """It may have died, and the cluster not know it yet: that it is absent is said."""
    del keepers["a"]
    protection.take_inventory(1, (), keepers, NODES, DEADLINE)
    protection.answered(answer("b"))
    found = outcome(protection, keepers, 0.1)
    assert found is not None and found.absent == ("a",)


def test_who_does_not_answer_is_waited_for_until_the_limit_or_until_it_is_dead(
    protection: Protection, keepers: Keepers
) -> None:
    for number in (1, 2):
        protection.take_inventory(number, (), keepers, NODES, DEADLINE)
        protection.answered(answer("b", number))
        assert outcome(protection, keepers, DEADLINE / 2) is None
        if number == 2:
            protection.forget("a")
        found = outcome(protection, keepers, DEADLINE if number == 1 else DEADLINE / 2)
        assert found is not None and found.absent == (("a",) if number == 1 else ())
