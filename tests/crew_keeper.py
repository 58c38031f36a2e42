"""A crew's keeper: the one of its only node, in the test's own process. There is no parity."""

from __future__ import annotations

from pathlib import Path

from actors.vault import Vault
from resilient.core.events import InventoryTaken
from resilient.core.plan import Address, Plan
from resilient.protection import rings


class CrewKeeper:
    def __init__(self, node: str, folder: Path, secret: str) -> None:
        self._node = node
        self._vault = Vault(run="crew", attempt=1, node=node, folder=folder, secret=secret, ip="127.0.0.1")

    def protect(self, plan: Plan) -> None:
        self._vault.ring(rings(plan, 0, {})[self._node])

    def inventory(self, asked: int) -> InventoryTaken:
        host, port = self._vault.address
        return InventoryTaken(
            asked=asked,
            inventories=(self._vault.inventory(),),
            addresses=((self._node, Address(host=host, port=port)),),
            absent=(),
        )

    def close(self) -> None:
        self._vault.close()
