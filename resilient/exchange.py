"""From every rank's partial sums to the same complete result on all: slice by slice, in tree order.

The payload is cut into one slice per rank. Every rank sends the owner of a slice its roots' bytes of
it; the owner folds them in the order of the tree and sends the folded slice to everybody. Both ways
stream in chunks, so that sending, folding and receiving overlap. With one root per rank that is
2 (n-1)/n of the payload sent and received by each rank, as in the best all-reduce; each further root
of a rank costs one more slice per peer on the first way.

Nothing is written into the partial sums. The result is written out of place; when the exchange is
abandoned its buffers are never used again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from actors.group import Group
from actors.pending import Move

from .core.plan import Plan
from .core.tree import Fold, Node, owned
from .payload import ALIGN_BYTES, Layout, Payload, fold_range, merged_counts, release_pages
from .sums import StepSums

CHUNK_BYTES = 2 << 20
WAIT_EVERY = 32
"""Chunks, on a device."""
GATHER_TAG = 1 << 20
"""Tags from here on belong to the way back."""


_given_up: list[Tensor] = []


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """Of all roots of a stage's ranks: whose they are, by which tag they go, and in which order they are folded."""

    plan: Plan
    ranks: tuple[int, ...]
    """Of the stage, ascending."""
    owners: dict[Node, int]
    """From left to right."""
    tags: dict[Node, int]
    order: tuple[Fold, ...]

    @classmethod
    def of(cls, plan: Plan, rank: int) -> Route:
        ranks = plan.team(rank)
        owners, order = owned(plan.owners(ranks))
        tags = {root: tag for tag, root in enumerate(owners)}
        return cls(plan=plan, ranks=ranks, owners=owners, tags=tags, order=order)


@dataclass(slots=True)
class Scratch:
    """Of one group, kept between steps: receiving buffers and route. Dropped with the group when it is abandoned."""

    flat: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    _route: Route | None = None

    def route(self, plan: Plan, rank: int) -> Route:
        """Made once per plan: at thousands of ranks it takes longer than many a step."""
        if self._route is None or self._route.plan is not plan:
            self._route = Route.of(plan, rank)
        return self._route

    def give_up(self) -> None:
        """An abandoned exchange may still write here: keep the addresses, give the pages back. A device's memory the
        group keeps until nothing writes there any more."""
        if self.flat.device.type == "cpu":
            release_pages(self.flat)
            _given_up.append(self.flat)

    def rows(self, count: int, nbytes: int, device: torch.device) -> list[Tensor]:
        if self.flat.numel() < count * nbytes or self.flat.device != device:
            self.flat = torch.empty(count * nbytes, dtype=torch.uint8, device=device)
        return [self.flat[row * nbytes : (row + 1) * nbytes] for row in range(count)]


def slices(nbytes: int, size: int) -> tuple[tuple[int, int], ...]:
    """The payload cut into `size` byte ranges as even as alignment allows."""
    units = -(-nbytes // ALIGN_BYTES)
    cuts = [min(nbytes, units * rank // size * ALIGN_BYTES) for rank in range(size)] + [nbytes]
    return tuple(pairwise(cuts))


def chunks(start: int, stop: int) -> list[tuple[int, int]]:
    return [(at, min(at + CHUNK_BYTES, stop)) for at in range(start, stop, CHUNK_BYTES)]


def exchange(
    group: Group,
    plan: Plan,
    sums: Mapping[Node, Payload],
    result: Payload,
    scratch: Scratch,
    counts: Mapping[Node, Sequence[int]] | None,
) -> None:
    """Fold the sums of all ranks of this one's stage into `result` (same bytes and counts on each of them).

    sums: this rank's roots. counts: presence per root of each of them, or None where all hold the same
    tensors. Raises LinkBroken; then result and scratch must be given up.
    """
    route = scratch.route(plan, group.rank)
    owners, order = route.owners, route.order
    assert set(sums) == {root for root, rank in owners.items() if rank == group.rank}, (sums.keys(), owners)
    _set_counts(result, plan, sums, order, counts)
    if len(route.ranks) == 1:
        _fold(result.layout, sums, {}, order, result.flat, 0, result.layout.nbytes, counts)
        return
    parts = dict(zip(route.ranks, slices(result.layout.nbytes, len(route.ranks)), strict=True))
    start, stop = parts[group.rank]
    foreign = [root for root in owners if owners[root] != group.rank]
    rows = dict(zip(foreign, scratch.rows(len(foreign), stop - start, result.flat.device), strict=True))
    _run(group, parts, route, sums, rows, result, counts)


def _run(
    group: Group,
    parts: Mapping[int, tuple[int, int]],
    route: Route,
    sums: Mapping[Node, Payload],
    rows: Mapping[Node, Tensor],
    result: Payload,
    counts: Mapping[Node, Sequence[int]] | None,
) -> None:
    start, _ = parts[group.rank]
    mine = chunks(*parts[group.rank])
    rounds = max(len(chunks(*part)) for part in parts.values())
    mine_at = route.ranks.index(group.rank)
    peers = [*route.ranks[mine_at + 1 :], *route.ranks[:mine_at]]

    def there(turn: int) -> tuple[list[Move], list[Move]]:
        sends = [
            Move(data=sums[root].flat[slice(*piece)], peer=peer, tag=route.tags[root])
            for peer in peers
            for piece in chunks(*parts[peer])[turn : turn + 1]
            for root in sorted(sums)
        ]
        receives = [
            Move(data=row[low - start : high - start], peer=route.owners[root], tag=route.tags[root])
            for low, high in mine[turn : turn + 1]
            for root, row in rows.items()
        ]
        return sends, receives

    def back(turn: int) -> tuple[list[Move], list[Move]]:
        sends = [
            Move(data=result.flat[slice(*piece)], peer=peer, tag=GATHER_TAG)
            for piece in mine[turn : turn + 1]
            for peer in peers
        ]
        receives = [
            Move(data=result.flat[slice(*piece)], peer=peer, tag=GATHER_TAG)
            for peer in peers
            for piece in chunks(*parts[peer])[turn : turn + 1]
        ]
        return sends, receives

    coming = [group.post(*there(turn)) for turn in range(rounds)]
    returning = []
    for turn in range(rounds):
        # A device's stream goes on by itself; waited for now and then, so that it is seen whether anything comes.
        coming[turn].wait() if turn % WAIT_EVERY == WAIT_EVERY - 1 else coming[turn].follow()
        for low, high in mine[turn : turn + 1]:
            target = result.flat[low:high]
            received = {root: row[low - start : high - start] for root, row in rows.items()}
            _fold(result.layout, sums, received, route.order, target, low, high, counts)
        returning.append(group.post(*back(turn)))
    for pending in returning:
        pending.wait()


def _fold(
    layout: Layout,
    sums: Mapping[Node, Payload],
    received: Mapping[Node, Tensor],
    order: Sequence[Fold],
    target: Tensor,
    low: int,
    high: int,
    counts: Mapping[Node, Sequence[int]] | None,
) -> None:
    """Fold one byte range of all roots into `target`, writing only into received bytes and target."""
    at: dict[Node, Tensor] = dict(received)
    own = {root: payload.flat[low:high] for root, payload in sums.items()}
    held = dict(counts or {})
    if not order:
        (whole,) = (own | at).values()
        target.copy_(whole)
        return
    for turn, (node, left, right) in enumerate(order):
        one, other = (at[side] if side in at else own[side] for side in (left, right))
        last = turn == len(order) - 1
        into = target if last else at[left] if left in at else at[right] if right in at else torch.empty_like(one)
        masks = (held[left], held[right]) if counts is not None else None
        fold_range(layout, into, one, other, low, masks)
        at[node] = into
        if counts is not None:
            held[node] = merged_counts(held[left], held[right])


def _set_counts(
    result: Payload,
    plan: Plan,
    sums: Mapping[Node, Payload],
    order: Sequence[Fold],
    counts: Mapping[Node, Sequence[int]] | None,
) -> None:
    if counts is None:
        some = next(iter(sums.values())).counts
        result.counts = [plan.micro_batches if count else 0 for count in some]
        return
    total = [0] * len(result.counts)
    for own in counts.values():
        total = merged_counts(total, own)
    result.counts = total


def exchange_fast(group: Group, sums: Mapping[Node, Payload], result: Payload) -> None:
    """The same by plain all-reduce, without a fixed order: for those who don't need the bits.

    Absent tensors count as zero here; integers take the lowest rank's that has them.
    """
    total = torch.zeros(len(result.counts), dtype=torch.int64, device=result.flat.device)
    result.flat.zero_()
    for root in sorted(sums):
        payload = sums[root]
        masks = (result.counts, payload.counts)
        fold_range(result.layout, result.flat, result.flat, payload.flat, 0, masks)
        result.counts = merged_counts(result.counts, payload.counts)
    total += torch.tensor(result.counts, device=total.device)
    _agree_on_integers(group, result)
    for section in result.layout.sections:
        if section.rule == "sum" and section.stop > section.start:
            group.sum(result.flat[section.start : section.stop].view(section.dtype))
    group.sum(total)
    result.counts = [int(count) for count in total.tolist()]


def _agree_on_integers(group: Group, result: Payload) -> None:
    """Of entries that are not added, keep the first rank's that has them and clear them elsewhere."""
    numbers = [number for number, entry in enumerate(result.layout.entries) if entry.rule == "first"]
    if not numbers:
        return
    everyone = group.gather([result.counts[number] for number in numbers])
    for column, number in enumerate(numbers):
        keeper = next((rank for rank, row in enumerate(everyone) if row[column]), None)
        if keeper != group.rank:
            entry = result.layout.entries[number]
            result.flat[entry.start : entry.stop].zero_()
    for section in result.layout.sections:
        if section.rule == "first" and section.stop > section.start:
            group.sum(result.flat[section.start : section.stop])


def exchange_alone(sums: StepSums) -> Payload:
    """The complete result of a step whose micro-batches are all this rank's: the sum itself."""
    (whole,) = sums.partial.nodes
    return sums.partial.nodes.pop(whole)
