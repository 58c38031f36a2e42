"""Layers change hands at a step's boundary: whoever takes one over receives its state from those who have it.

All ranks of the new generation take part; who had a layer keeps it until the generation has formed, so that a change
which fails can be gone back on.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import xxhash

from actors.group import Group, Move
from snapshot.capture import capture
from snapshot.core.ranges import Ranges, merged
from snapshot.skeleton import Skeleton
from snapshot.table import StateTable

from .core.moves import Transfer, transfers, without
from .core.plan import Plan
from .core.shards import chunks_from
from .exchange import CHUNK_BYTES
from .spelling import NOTHING

if TYPE_CHECKING:
    from .member import Member

TEXT_TAG, LAYER_TAG = (1 << 22) + 8, (1 << 22) + 16


class Moving:
    """One rank's part. Raises LinkBroken, or Superseded when a newer generation has begun."""

    def __init__(self, member: Member, plan: Plan, rank: int, group: Group) -> None:
        self._member, self._plan, self._rank, self._group = member, plan, rank, group

    def move(self, has_state: bool, layers: range) -> None:
        """has_state: of these layers, and what belongs to none."""
        member, plan = self._member, self._plan
        initial = plan.kind == "initial"
        if initial or has_state:
            member.wait_for_boundary(plan.generation)
        known = member.stage.spelling() if initial or has_state else NOTHING
        member.stage.take_spelling(self._group.gather_bytes(known))
        owned = self._deal_shards(initial)
        member.stage.bring(plan, self._rank, initial=initial)
        if initial and self._all_equal():
            return
        stage = plan.stage_of(self._rank)
        assert stage is not None
        if initial:  # whoever is first in a stage has built what counts
            has_state, layers = stage.ranks[0] == self._rank, range(stage.first, stage.stop)
        row = [layers.start, layers.stop] if has_state else [0, 0]
        self._transfer(self._group.gather(row), owned)

    def _deal_shards(self, initial: bool) -> list[frozenset[int]]:
        """By rank, the chunks of optimizer state that it has, if any are in shards."""
        shards, plan = self._member.stage.shards, self._plan
        if shards is None:
            return [frozenset()] * plan.size
        if initial:
            shards.deal(plan)
            first = {stage.ranks[0] for stage in plan.stages}
            return [shards.all_of(plan, rank) if rank in first else frozenset() for rank in range(plan.size)]
        told = self._group.gather_bytes(shards.told())
        shards.deal(plan, told)
        return [chunks_from(text) for text in told]

    def _all_equal(self) -> bool:
        """Whether the ranks of each stage have built the same, and all of them what belongs to no layer."""
        table = capture(self._member.objects())
        whereabouts = self._member.stage.whereabouts
        nobodys = whereabouts.held(table.layout.tensors, range(0))
        rows = self._group.gather([_digest(table, ranges) for ranges in (table.held_ranges(), nobodys)])
        stages = [{tuple(rows[rank]) for rank in stage.ranks} for stage in self._plan.stages]
        return all(len(found) == 1 for found in stages) and len({row[1] for row in rows}) == 1

    def _transfer(self, rows: Sequence[Sequence[int]], owned: Sequence[frozenset[int]]) -> None:
        """By rank, the layers that it has, and the chunks of optimizer state that is in shards."""
        member, plan = self._member, self._plan
        mine = capture(member.objects()) if rows[self._rank][1] else None
        skeleton = self._skeleton(mine, rows)
        moves = (*transfers(*self._has_and_wants(skeleton, rows)), *self._shard_transfers(skeleton, owned))
        coming = [each for each in moves if each.receiver == self._rank]
        own = mine or StateTable.empty(skeleton, merged((each.start, each.stop) for each in coming))
        sends = [part for each in moves if each.sender == self._rank for part in _pieces(own, each, each.receiver)]
        receives = [part for each in coming for part in _pieces(own, each, each.sender)]
        self._group.post_host(sends, receives).wait()
        member.require_current(plan.generation)
        if mine is None:
            member.load(plan.generation, own)

    def _has_and_wants(
        self, skeleton: bytes, rows: Sequence[Sequence[int]]
    ) -> tuple[list[Ranges], list[Ranges]]:
        plan, whereabouts = self._plan, self._member.stage.whereabouts
        specs = Skeleton.from_bytes(skeleton).tensors
        has: list[Ranges] = [whereabouts.held(specs, range(*row)) if row[1] else () for row in rows]
        if plan.kind == "initial":  # of what belongs to no layer everybody has some, and only that of rank 0 counts
            nobodys = whereabouts.held(specs, range(0))
            has = [has[0], *(without(ranges, nobodys) for ranges in has[1:])]
        wants: list[Ranges] = [()] * plan.size
        for stage in plan.stages:
            needed = whereabouts.held(specs, range(stage.first, stage.stop))
            for rank in stage.ranks:
                wants[rank] = needed
        return has, wants

    def _shard_transfers(self, skeleton: bytes, owned: Sequence[frozenset[int]]) -> tuple[Transfer, ...]:
        """Chunk by chunk, from whoever had it to whoever has it now."""
        stage, plan = self._member.stage, self._plan
        if stage.shards is None:
            return ()
        specs = Skeleton.from_bytes(skeleton).tensors
        wants = [stage.whereabouts.owned(specs, stage.shards.owned(plan, rank)) for rank in range(plan.size)]
        return transfers([stage.whereabouts.owned(specs, chunks) for chunks in owned], wants)

    def _skeleton(self, mine: StateTable | None, rows: Sequence[Sequence[int]]) -> bytes:
        """That of the first who has a state, for all."""
        first = next(rank for rank, row in enumerate(rows) if row[1])
        lacking = [rank for rank, row in enumerate(rows) if not row[1]]
        if self._rank == first:
            assert mine is not None
            text = torch.frombuffer(bytearray(mine.skeleton), dtype=torch.uint8)
            length = torch.tensor([text.numel()]).view(torch.uint8)
            self._group.post_host([Move(data=length, peer=peer, tag=TEXT_TAG) for peer in lacking], []).wait()
            self._group.post_host([Move(data=text, peer=peer, tag=TEXT_TAG + 1) for peer in lacking], []).wait()
        if mine is not None:
            return mine.skeleton
        size = torch.zeros(1, dtype=torch.int64)
        self._group.post_host([], [Move(data=size.view(torch.uint8), peer=first, tag=TEXT_TAG)]).wait()
        text = torch.empty(int(size), dtype=torch.uint8)
        self._group.post_host([], [Move(data=text, peer=first, tag=TEXT_TAG + 1)]).wait()
        return text.numpy().tobytes()


def _digest(table: StateTable, ranges: Ranges) -> int:
    """Of the structure and these bytes, 63 bits."""
    hashed = xxhash.xxh3_64(table.skeleton)
    for start, stop in ranges:
        for piece in table.pieces(start, stop):
            hashed.update(piece.cpu().numpy().data)
    return int(hashed.intdigest() >> 1)


def _pieces(table: StateTable, transfer: Transfer, peer: int) -> list[Move]:
    """Cut by the state's chunks: of a tensor that is held in part, sender and receiver may have other parts."""
    ends = table.chunk_ends()
    inner = ends[bisect_right(ends, transfer.start) : bisect_left(ends, transfer.stop)]
    return [
        Move(data=part.cpu() if part.is_cuda else part, peer=peer, tag=LAYER_TAG)
        for start, stop in pairwise((transfer.start, *inner, transfer.stop))
        for piece in table.pieces(start, stop)
        for part in torch.split(piece, CHUNK_BYTES)
    ]
