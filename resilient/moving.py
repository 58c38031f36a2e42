"""Layers change hands from a step's boundary on: whoever takes one over receives its state from those who have it.

What forward and backward need comes first. As soon as a rank has that it goes on with the step, and what optimizers
keep comes while it computes: neither changes before the step's end, which is not reached before all have everything.
Only where a memory limit leaves no room for coming and going layers during a step does a rank wait for all.

All ranks of the new generation take part; who had a layer keeps it until the generation has formed, so that a change
which fails can be gone back on.
"""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import xxhash

from actors.group import Group
from actors.pending import LinkBroken, Move
from snapshot.capture import capture
from snapshot.core.ranges import Ranges, holds, merged
from snapshot.skeleton import Skeleton, TensorSpec
from snapshot.table import StateTable, still

from .core.difference import rollback_after_move
from .core.moves import Transfer, divided, transfers, without
from .core.plan import Plan
from .core.seat import Rollback
from .core.shards import chunks_from
from .errors import StateDiverged
from .exchange import CHUNK_BYTES
from .payload import abandon
from .spelling import NOTHING

if TYPE_CHECKING:
    from .member import Member

TEXT_TAG, LAYER_TAG = (1 << 22) + 8, (1 << 22) + 16


class HoldersDiffer(Exception):
    """Ranks that had the same layer before it was to move hold different bytes of it: all have to go back."""

    def __init__(self, wanted: Rollback) -> None:
        super().__init__(wanted.why)
        self.wanted = wanted


class Moving:
    """One rank's part. Raises LinkBroken, HoldersDiffer, or Superseded when a newer generation has begun."""

    def __init__(self, member: Member, plan: Plan, rank: int, group: Group) -> None:
        self._member, self._plan, self._rank, self._group = member, plan, rank, group

    def move(self, has_state: bool, layers: range, complete: int) -> None:
        """has_state: of these layers, and what belongs to none. complete: the step at whose end this happens."""
        member, plan = self._member, self._plan
        initial = plan.kind == "initial"
        if initial or has_state:
            member.turns.wait_for_boundary(plan.generation)
        else:
            member.turns.wait_until_parked(plan.generation)
        known = member.stage.spelling() if initial or has_state else NOTHING
        told = self._group.gather_bytes(known)
        with member.turns.changing(plan.generation):
            member.stage.take_spelling(told)
        owned = self._deal_shards(initial)
        member.bring(plan, self._rank, initial=initial)
        if initial and self._all_equal():
            return
        stage = plan.stage_of(self._rank)
        assert stage is not None
        if initial:  # whoever is first in a stage has built what counts
            has_state, layers = stage.ranks[0] == self._rank, range(stage.first, stage.stop)
        row = [layers.start, layers.stop] if has_state else [0, 0]
        self._transfer(self._group.gather(row), owned, complete)

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
        structure = int(xxhash.xxh3_64_intdigest(table.skeleton) >> 1)
        rows = self._group.gather([_digest(table, table.held_ranges()), _digest(table, nobodys), structure])
        stages = [{row[0] for row in (rows[rank] for rank in stage.ranks)} for stage in self._plan.stages]
        return all(len(found) == 1 for found in stages) and len({tuple(row[1:]) for row in rows}) == 1

    def _transfer(self, rows: Sequence[Sequence[int]], owned: Sequence[frozenset[int]], complete: int) -> None:
        """By rank, the layers that it has, and the chunks of optimizer state that is in shards."""
        member, plan = self._member, self._plan
        mine = capture(member.objects()) if rows[self._rank][1] else None
        skeleton = self._skeleton(mine, rows)
        specs = Skeleton.from_bytes(skeleton).tensors
        chunks = self._shard_transfers(specs, owned)
        moves = transfers(*self._has_and_wants(specs, rows))
        now, later = divided(moves, member.stage.whereabouts.for_updates(specs))
        coming = (each for each in (*moves, *chunks) if each.receiver == self._rank)
        received = StateTable.empty(skeleton, merged((each.start, each.stop) for each in coming))
        self._send_and_receive(mine, received, now)
        if mine is None:  # what is still to come is loaded too: there is a place for it then
            member.turns.load(plan.generation, received)
            mine = capture(member.objects())
            assert mine.layout.tensors == specs, "loading a state has made another of it"
        else:
            self._take_over(mine, received, now)
        if plan.kind == "planned" and member.stage.has_room_to_begin():
            mine = still(mine)
            member.begin_ahead(plan, complete)
        self._send_and_receive(mine, received, (*later, *chunks))
        self._take_over(mine, received, (*later, *chunks))
        self._compare(mine, specs, rows)
        self._compare_shards(mine, chunks)

    def _send_and_receive(self, mine: StateTable | None, received: StateTable, moves: Sequence[Transfer]) -> None:
        sends = [] if mine is None else _sends(mine, moves, self._rank)
        receives = [part for each in self._coming(moves) for part in _pieces(received, each, each.sender)]
        try:
            self._group.post_host(sends, receives).wait()
        except LinkBroken:
            abandon(move.data for move in receives)
            raise

    def _take_over(self, mine: StateTable, received: StateTable, moves: Sequence[Transfer]) -> None:
        with self._member.turns.changing(self._plan.generation):
            for each in self._coming(moves):
                for target, source in zip(_pieces(mine, each, 0), _pieces(received, each, 0), strict=True):
                    target.data.copy_(source.data)

    def _coming(self, moves: Sequence[Transfer]) -> list[Transfer]:
        return [each for each in moves if each.receiver == self._rank]

    def compare_restored(self) -> None:
        """The same when all have taken their part from a snapshot."""
        table = capture(self._member.objects())
        self._compare(table, table.layout.tensors, [(0, 0)] * self._plan.size)

    def _compare(self, table: StateTable, specs: Sequence[TensorSpec], rows: Sequence[Sequence[int]]) -> None:
        """Everybody's bytes of each layer with everybody else's: nothing goes on with what was not received as it was
        sent."""
        held, mine = table.held_ranges(), {}
        for users, ranges in self._member.stage.whereabouts.groups(specs).items():
            if all(holds(held, start, stop) for start, stop in ranges):
                mine[",".join(map(str, users))] = _digest(table, ranges)
        told = [json.loads(text) for text in self._group.gather_bytes(json.dumps(mine).encode())]
        if found := differing(rows, told):
            self._say_who_differs(found)
        check_received(told)

    def _say_who_differs(self, found: Mapping[str, Mapping[int, int]]) -> None:
        """All ranks come here together."""
        member, plan = self._member, self._plan
        if plan.kind == "initial":
            what, digests = next(iter(found.items()))
            raise StateDiverged(
                f"{what}: ranks {', '.join(map(str, sorted(digests)))} have built it with different bits; see that "
                "what builds a layer depends on nothing but torch's generators"
            )
        verified = max(row[0] for row in gathered(self._group, [member.capturing.verified(plan)], self._rank, [-1]))
        raise HoldersDiffer(rollback_after_move(plan, member.step, found, verified))

    def _compare_shards(self, table: StateTable, moved: Sequence[Transfer]) -> None:
        """What has been received with what was sent."""
        if self._member.stage.shards is None:
            return
        mine = {
            place: _digest(table, ((each.start, each.stop),))
            for place, each in enumerate(moved)
            if self._rank in (each.sender, each.receiver)
        }
        told = [json.loads(text) for text in self._group.gather_bytes(json.dumps(mine).encode())]
        for place, each in enumerate(moved):
            if told[each.sender][str(place)] != told[each.receiver][str(place)]:
                raise LinkBroken(f"rank {each.receiver} did not receive optimizer state as rank {each.sender} sent it")

    def _has_and_wants(
        self, specs: Sequence[TensorSpec], rows: Sequence[Sequence[int]]
    ) -> tuple[list[Ranges], list[Ranges]]:
        plan, whereabouts = self._plan, self._member.stage.whereabouts
        kinds = {tuple(row) for row in rows}  # as many as there are stages
        by_layers = {row: whereabouts.held(specs, range(*row)) if row[1] else () for row in kinds}
        has = [by_layers[tuple(row)] for row in rows]
        if plan.kind == "initial":  # of what belongs to no layer everybody has some, and only that of rank 0 counts
            nobodys = whereabouts.held(specs, range(0))
            has = [has[0], *(without(ranges, nobodys) for ranges in has[1:])]
        wants: list[Ranges] = [()] * plan.size
        for stage in plan.stages:
            needed = whereabouts.held(specs, range(stage.first, stage.stop))
            for rank in stage.ranks:
                wants[rank] = needed
        return has, wants

    def _shard_transfers(self, specs: Sequence[TensorSpec], owned: Sequence[frozenset[int]]) -> tuple[Transfer, ...]:
        """Chunk by chunk, from whoever had it to whoever has it now."""
        stage, plan = self._member.stage, self._plan
        if stage.shards is None:
            return ()
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


def gathered(group: Group, mine: list[int], rank: int, unknown: list[int]) -> list[list[int]]:
    """Of each rank what it brings, where ranks have seen that states differ; of all others `unknown` if a link breaks:
    whoever differs may have been ended for it already, and all go back in any case."""
    try:
        return group.gather(mine)
    except LinkBroken:
        return [mine if other == rank else unknown for other in range(group.size)]


def differing(had: Sequence[Sequence[int]], told: Sequence[Mapping[str, int]]) -> dict[str, dict[int, int]]:
    """What those who had it before hold different bytes of: in words, with the digest of each of them by rank.

    had: by rank the first of the layers that it had before, and the one after the last; 0, 0 for none. told: by rank,
    by layers that use it, the digest of what it holds now.
    """
    found: dict[str, dict[int, int]] = {}
    for layers, digests in _by_layers(told).items():
        users = {int(layer) for layer in layers.split(",") if layer}
        before = {
            rank: digest
            for rank, digest in digests.items()
            if had[rank][1] and (not users or users & set(range(*had[rank])))
        }
        if len(set(before.values())) > 1:
            found[_in_words(layers)] = before
    return found


def check_received(told: Sequence[Mapping[str, int]]) -> None:
    """told: as for `differing`. Raises LinkBroken where ranks hold different bytes of the same."""
    for layers, digests in _by_layers(told).items():
        if len(set(digests.values())) > 1:
            ranks = ", ".join(map(str, digests))
            raise LinkBroken(f"{_in_words(layers)} was not received as it was sent, by one of ranks {ranks}")


def _by_layers(told: Sequence[Mapping[str, int]]) -> dict[str, dict[int, int]]:
    """By layers, by rank that holds what they use, its digest."""
    names = sorted({layers for digests in told for layers in digests})
    return {
        layers: {rank: digests[layers] for rank, digests in enumerate(told) if layers in digests} for layers in names
    }


def _in_words(layers: str) -> str:
    return f"layer {layers}" if layers else "what belongs to no layer"


def _digest(table: StateTable, ranges: Ranges) -> int:
    """Of these bytes, 63 bits."""
    hashed = xxhash.xxh3_64()
    for start, stop in ranges:
        for piece in table.pieces(start, stop):
            hashed.update(piece.cpu().numpy().data)
    return int(hashed.intdigest() >> 1)


def _sends(table: StateTable, moves: Sequence[Transfer], rank: int) -> list[Move]:
    return [part for each in moves if each.sender == rank for part in _pieces(table, each, each.receiver)]


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
