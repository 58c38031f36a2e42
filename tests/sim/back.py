"""The way back: every member of a restored generation loads the snapshot from the keepers, or can't."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from resilient.core.plan import Restore

from .stages import layers_of
from .truth import NO_VALUE, NOBODYS, Held, State, read

if TYPE_CHECKING:
    from .group import Group


class WayBack:
    def __init__(self, group: Group, restore: Restore) -> None:
        self.group, self.world, self.restore = group, group.world, restore
        self._loaded: set[int] = set()

    def begin(self) -> None:
        self.world.faults.point("restoring", list(self.group.plan.members))
        for number in self.group.plan.members:
            self._after(number, self._wait_until_parked)

    def _after(self, number: int, action: Callable[[int], None]) -> None:
        def go_on() -> None:
            if self.group.within(number):
                action(number)

        self.group.member(number).later(self.world.rng.uniform(0.005, 0.1), go_on)

    def _wait_until_parked(self, number: int) -> None:
        rank = self.group.member(number)
        if not rank.parked or (self.group.plan.stages and rank.capturing.copying):
            self._after(number, self._wait_until_parked)
            return
        if self.restore.folder:
            self._after(number, self._read_storage)
        else:
            self._fetch(number, 0, [])

    def _read_storage(self, number: int) -> None:
        broke = not self.world.healing and self.world.rng.random() < 0.5
        state = None if broke else self.world.storage.read(self.restore.folder)
        if state is None:
            self._could_not(number, "a checkpoint could not be read")
        else:
            self.world.seen["a checkpoint was loaded"] += 1
            self._load(number, state)

    def _could_not(self, number: int, what: str) -> None:
        self.world.seen[what] += 1
        self.group.broken = True
        self.group.member(number).form_failed(self.group.plan.generation)

    def _fetch(self, number: int, place: int, parts: list[Held]) -> None:
        """One share after the other, from the keeper that the plan names."""
        if place == len(self.restore.shares):
            self._load(number, read(parts))
            return
        share = self.restore.shares[place]
        keeper = self.world.keeper_of(share.keeper.host)
        reached = keeper is not None and keeper.incarnation == share.keeper.port
        state = keeper.memory.read_share(self.restore.key, share.node, share.rank) if keeper and reached else None
        if state is None:
            self._could_not(number, "a share could not be loaded")
            return
        self.world.faults.point_at_node("loading", share.keeper.host)
        self._after(number, lambda number: self._fetch(number, place + 1, [*parts, state]))

    def _load(self, number: int, state: State) -> None:
        """Only what this rank needs of it."""
        plan, complete = self.group.plan, self.restore.key.step - 1
        rank = self.group.member(number)
        wanted = (NOBODYS, *layers_of(plan, number, self.world.setting.layers))
        rank.load(plan.generation, self.restore, {layer: state.get(layer, NO_VALUE) for layer in wanted})
        self._loaded.add(number)
        self.world.faults.point("restored", [number])
        if self._loaded == set(plan.members):
            self.world.seen["all members have loaded a snapshot"] += 1
            self.group.level(complete)
