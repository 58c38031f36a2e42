"""The way back to a snapshot: ask the keepers, elect, have decoded what is missing, until it can be read.

    idle --ask--> asking --InventoryTaken--> elected, every image whole somewhere
                    ^                  \\--> decoding --ImagesDecoded--> asking
                    |                  \\--> nothing readable: asked again, for as long as that may change
                    +--a node is lost: what was elected counts no more

An election starts only when every rank that wrote has certainly ended: the keepers answer no earlier.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from snapshot.core.branches import Branch, Lineage
from snapshot.core.decoding import Decode, Read
from snapshot.core.election import Elected, NotRecoverable, elect
from snapshot.core.inventory import Inventory

from .events import ImagesDecoded, InventoryTaken
from .instructions import DecodeImages, Instruction, TakeInventory
from .plan import Address, Restore, Share, first_branch
from .seat import Rollback


@dataclass(slots=True, kw_only=True)
class Restoring:
    ask_again_s: float
    answer_limit_s: float
    """How long keepers may take to answer, or to decode, before they are asked again."""
    lineage: Lineage = field(default_factory=first_branch)
    rollback: Rollback | None = None
    """Set while what is looked for is not the newest snapshot, but one to go back to."""
    elected: Elected | None = None
    """Set when every image of it is whole in the memory of a live keeper."""
    none: NotRecoverable | None = None
    """What the last answers came to, if nothing could be read from them."""
    absent: tuple[str, ...] = ()
    """Nodes whose keepers were expected to answer, and did not."""
    addresses: dict[str, Address] = field(default_factory=dict)
    asked: int = 0
    _asked_at: float | None = None
    waiting: bool = False
    """Whether an answer is awaited."""

    not_before: int = 0
    """Snapshots in memory of attempts before this one are left alone."""

    def again(self) -> None:
        """What was known may have changed."""
        self.elected, self.none, self._asked_at, self.waiting = None, None, None, False

    def look_for(self, rollback: Rollback | None) -> None:
        if rollback != self.rollback:
            self.rollback = rollback
            self.again()

    def ask(self, ended: tuple[int, ...], now: float) -> tuple[Instruction, ...]:
        """Whatever is to be done now to come to an election. `ended`: members that must have ended."""
        if self.elected is not None:
            return ()
        wait_s = self.answer_limit_s if self.waiting else self.ask_again_s
        if self._asked_at is not None and now - self._asked_at < wait_s:
            return ()
        self.asked, self._asked_at, self.waiting = self.asked + 1, now, True
        return (TakeInventory(asked=self.asked, ended=ended),)

    def answered(self, event: InventoryTaken, now: float) -> tuple[Instruction, ...]:
        if event.asked != self.asked or self.elected is not None:
            return ()
        self.waiting = False
        self.absent, self.addresses = event.absent, dict(event.addresses)
        found = elect([self._since(inventory) for inventory in event.inventories], self.line_to_look_on())
        if isinstance(found, NotRecoverable):
            self.none, self._asked_at = found, now
            return ()
        self.none = None
        if any(isinstance(image, Decode) for image in found.images):
            self._asked_at, self.waiting = now, True
            return (DecodeImages(asked=self.asked, elected=found),)
        self.elected = found
        return ()

    def _since(self, inventory: Inventory) -> Inventory:
        if not self.not_before:
            return inventory
        return replace(
            inventory,
            images=tuple(found for found in inventory.images if found.key.attempt >= self.not_before),
            parities=tuple(found for found in inventory.parities if found.key.attempt >= self.not_before),
        )

    def decoded(self, event: ImagesDecoded) -> None:
        """Seen in the next inventory, as images that are whole again."""
        if event.asked == self.asked:
            self._asked_at = None

    def line_to_look_on(self) -> Lineage:
        return self.lineage if self.rollback is None else self.opened(self.rollback.back_to)

    def line_to_go_on(self, step: int) -> Lineage:
        """That of the generation which begins from the state at the start of `step`."""
        if self.rollback is None:
            return self.lineage
        first = self.lineage.position_of(step) if self.rollback.skip_from is None else self.rollback.skip_from
        return self.opened(step, tuple(range(first, self.rollback.skip_to + 1)))

    def opened(self, at_step: int, skipped: tuple[int, ...] = ()) -> Lineage:
        """With a new branch from there."""
        parent = self.lineage.newest.number
        kept = tuple(position for position in skipped if position not in self.lineage.skipped)
        branch = Branch(number=parent + 1, parent=parent, at_step=at_step, skipped=kept)
        return Lineage(branches=(*self.lineage.branches, branch))

    def restore(self) -> Restore:
        assert self.elected is not None
        shares = [
            Share(rank=shard.rank, node=image.image.node, keeper=self.addresses[image.held_by])
            for image in self.elected.images
            if isinstance(image, Read)
            for shard in image.image.shards
        ]
        return Restore(
            key=self.elected.key,
            shares=tuple(sorted(shares, key=lambda share: share.rank)),
            decoded=any(isinstance(one, Read) and one.held_by != one.image.node for one in self.elected.images),
        )
