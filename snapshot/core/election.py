"""Which snapshot a run goes on from: the newest that can be read, and how to read it.

A snapshot can be read if all shards of the state are known, and every image that holds one is in the memory of a
live keeper or can be decoded. Snapshots of other branches than those on the newest one's line don't count. Those of
one step by different generations, or protected with different rings, are cut differently and never mixed.

The decision depends on the inventories' contents only, not on their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from snapshot.core.branches import Lineage
from snapshot.core.decoding import Decode, Read, Unreadable, plan_images
from snapshot.core.evidence import Evidence, gather
from snapshot.core.inventory import Inventory, ShardFound, SnapshotKey
from snapshot.core.ranges import first_uneven

MOST_SHOWN = 3
"""Of the snapshots that can't be read, in a reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PassedOver:
    """A snapshot on the line that can't be read, and why."""

    key: SnapshotKey
    ring: int
    reason: str

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Elected:
    """The snapshot to go on from.

    images: where every image with a shard that is needed comes from, by node.
    passed_over: the newer ones, newest first.
    ignored: inventory that was left aside, and why: lost, damaged or contradictory.
    """

    key: SnapshotKey
    ring: int
    images: tuple[Read | Decode, ...]
    reason: str
    passed_over: tuple[PassedOver, ...]
    ignored: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class NotRecoverable:
    """No snapshot in memory can be read. `reason` tells of the newest few, `passed_over` of all."""

    reason: str
    passed_over: tuple[PassedOver, ...]
    ignored: tuple[str, ...]


def elect(inventories: Sequence[Inventory], lineage: Lineage) -> Elected | NotRecoverable:
    """inventories: of all live keepers, one each; ValueError if one is there twice."""
    passed_over: list[PassedOver] = []
    ignored: list[str] = []
    for evidence in gather(inventories):
        key = evidence.key
        if not lineage.holds(key.branch, key.step):
            ignored.append(f"{key}: not on the line of branch {lineage.newest.number}")
            continue
        ignored.extend(evidence.ignored)
        try:
            images = plan_images(evidence, _nodes_needed(evidence))
        except Unreadable as missing:
            passed_over.append(PassedOver(key=key, ring=evidence.ring, reason=str(missing)))
            continue
        return Elected(
            key=key,
            ring=evidence.ring,
            images=images,
            reason=f"{key}: {_told(images)}",
            passed_over=tuple(passed_over),
            ignored=tuple(ignored),
        )
    return NotRecoverable(reason=_none(passed_over), passed_over=tuple(passed_over), ignored=tuple(ignored))


def _nodes_needed(evidence: Evidence) -> tuple[str, ...]:
    """The nodes whose images together hold every shard of the state."""
    found: dict[int, tuple[ShardFound, str]] = {}
    # A shard that is found twice is taken from where it need not be decoded.
    for node in sorted(evidence.known, key=lambda node: (evidence.whole(node) is None, node)):
        for shard in evidence.known[node].shards:
            known, other = found.setdefault(shard.rank, (shard, node))
            if known != shard:
                raise Unreadable(f"nodes {other} and {node} have different shards of rank {shard.rank}")
    if not found:
        raise Unreadable("no shard of it is known")
    shards = [found[rank][0] for rank in sorted(found)]
    states = sorted({(shard.world, shard.state_bytes, shard.skeleton) for shard in shards})
    if len(states) > 1:
        raise Unreadable(f"its shards are of different states (world, bytes, skeleton): {states}")
    world, state_bytes, _ = states[0]
    if missing := sorted(set(range(world)) - set(found)):
        shown = ", ".join(map(str, missing))
        raise Unreadable(f"of {world} shards nothing is left that tells where that of rank {shown} was")
    _check_covered(shards, state_bytes)
    return tuple(sorted({node for _, node in found.values()}))


def _check_covered(shards: Sequence[ShardFound], state_bytes: int) -> None:
    uneven = first_uneven((each for shard in shards for each in shard.ranges), state_bytes)
    if uneven is None:
        return
    reached, start = uneven
    if start == state_bytes:
        raise Unreadable(f"its shards end at byte {reached} of {state_bytes}")
    raise Unreadable(f"its shards leave out or repeat bytes between {reached} and {start}")


def _told(images: Sequence[Read | Decode]) -> str:
    decoded = [image for image in images if isinstance(image, Decode)]
    if not decoded:
        return f"all {len(images)} nodes' images are whole"
    told = []
    for image in decoded:
        parity = {source.held_by for piece in image.pieces for source in piece.sources if source.node is None}
        part = "" if image.held_by is None else f"{len(image.pieces)} of {image.group.data} pieces of "
        told.append(f"{part}that of node {image.image.node} decoded with parity of {', '.join(sorted(parity))}")
    return f"{len(images) - len(decoded)} of {len(images)} nodes' images are whole, {'; '.join(told)}"


def _none(passed_over: Sequence[PassedOver]) -> str:
    if not passed_over:
        return "no keeper holds a snapshot on the newest branch's line"
    shown = "; ".join(map(str, passed_over[:MOST_SHOWN]))
    more = len(passed_over) - MOST_SHOWN
    return f"no snapshot in memory can be read: {shown}" + (f"; and {more} more" if more > 0 else "")
