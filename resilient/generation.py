"""One generation of a rank at work: a thread that forms its group, levels it, and exchanges.

Everything that can block on other ranks happens here, never in the training thread; when a newer
generation comes this thread is simply left behind, with its buffers. What it would still bring in is
refused, because the member asks for the generation's number first.

Leveling: the ranks say what they hold. Who lacks the newest complete result gets it from those that
have it, in disjoint slices. In a planned generation the old members send joiners the state of their step boundary,
in disjoint slices too, while their training threads compute the step. In a pipeline layers change hands then (see
`moving`). In a restored generation all take the state of a snapshot from the keepers. A barrier ends it.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from actors.device import Mark
from actors.group import Group
from actors.pending import LinkBroken, Move, Waits
from actors.stream import TransferError
from snapshot.capture import capture
from snapshot.core.lifecycle import Ordinal
from snapshot.table import StateTable

from .core.lane import NOBODYS, AgreedLane, StepLane
from .core.outcome import Outcome
from .core.plan import Plan, Restore
from .core.tree import Node
from .errors import StateDiverged
from .exchange import CHUNK_BYTES, Scratch, exchange, exchange_fast
from .moving import HoldersDiffer, Moving, gathered
from .payload import Payload
from .stage_exchange import close_step

if TYPE_CHECKING:
    from .member import Member

KEPT_TAG, STATE_TAG = 1 << 21, 1 << 22
NEVER_STEP = -(1 << 40)


class Superseded(Exception):
    """A newer generation has begun: this thread's work is of no use any more. Nobody's fault."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """What a rank brings into a generation, fixed at the moment it adopts the plan."""

    has_state: bool
    complete: int
    kept: Payload | None
    reduced: Payload | None = None
    """Of step complete + 1, this rank's stage's sums, if it got so far: what others know of the step is not in it."""
    layers: range = range(0)
    """Those whose state this rank has, in a pipeline."""


class GenerationThread(threading.Thread):
    def __init__(self, member: Member, plan: Plan, holding: Holding) -> None:
        super().__init__(name=f"generation-{plan.generation}", daemon=True)
        self.plan = plan
        self.rank = plan.rank_of(member.number)
        self._member = member
        self._holding = holding
        self._steps: queue.Queue[tuple[int, Mark] | None] = queue.Queue()
        self._scratch = Scratch()
        self._in_flight: Payload | None = None
        self.waits = Waits()
        self.reduced = holding.reduced
        self.group: Group | None = None
        self._left = False

    def submit(self, step: int) -> None:
        """Exchange the sums of this step; the training thread keeps its hands off them until told."""
        self._steps.put((step, Mark(self._member.device)))

    def retire(self) -> None:
        """All members have moved on in agreement: end after what is under way."""
        self._steps.put(None)

    def abandon(self) -> None:
        """Leave it behind. Whatever it may still write into is never used again."""
        self._left = True
        if self.group is not None:
            self.group.abandon((self._in_flight, self._scratch.flat))
        if self._in_flight is not None:
            self._member.sums.pool.give_up(self._in_flight)
        self._scratch.give_up()
        self.retire()

    def _taken(self, payload: Payload) -> Payload:
        """From the pool. Whoever leaves this thread behind gives it up; if that was just now, nobody would."""
        self._in_flight = payload
        if self._left:
            self._member.sums.pool.give_up(payload)
            raise Superseded
        return payload

    def close(self) -> None:
        """It has retired, and the next has formed."""
        if self.group is not None:
            self.group.close()

    def run(self) -> None:
        torch.set_num_threads(self._member.threads)
        try:
            self.group = self._member.connect(self.plan, self.rank, self.waits)
            if self._left:  # while it formed, when there was nothing to give up yet
                self.group.abandon()
                return
            self._member.formed(self.plan, *self._level(self.group))
            while (asked := self._steps.get()) is not None:
                step, folded = asked
                folded.precede()
                self._exchange(self.group, step)
        except (LinkBroken, TransferError) as error:
            self._member.link_broken(self.plan, str(error))
            Mark(self._member.device).wait()  # until then kernels may write what this thread holds
        except HoldersDiffer as error:
            self._member.wants_back(self.plan, error.wanted)
        except Superseded:
            pass
        except BaseException as error:  # noqa: BLE001  the thread's edge: an error of ours must end the run, not hang it
            self._member.crashed(self.plan, error)

    # Leveling

    def _level(self, group: Group) -> tuple[int, Payload | None]:
        if self.plan.restore is not None:
            return self._restore(group, self.plan.restore), None
        if self.plan.kind == "unplanned" and self.plan.stages:
            self._member.stage.carry_on(self.plan)
        held = self._holding
        kept_step = held.complete if held.kept is not None else NEVER_STEP
        rows = group.gather([int(held.has_state), held.complete, kept_step])
        newest = max((complete for has_state, complete, _ in rows if has_state), default=-1)
        behind = [rank for rank, row in enumerate(rows) if row[0] and row[1] < newest]
        caught_up = None
        if behind and len(self.plan.stages) > 1:
            caught_up = self._learn_outcome(group, held, newest)
        elif behind:
            holders = [rank for rank, row in enumerate(rows) if row[2] == newest]
            assert holders, f"nobody holds the result of step {newest}: {rows}"
            caught_up = self._catch_up(group, held, holders, behind)
        if self.plan.kind != "unplanned":
            if held.has_state and self.plan.kind == "initial":
                self._member.turns.wait_for_boundary(self.plan.generation)
            joiners = [rank for rank, row in enumerate(rows) if not row[0]]
            if self.plan.stages:
                Moving(self._member, self.plan, self.rank, group).move(held.has_state, held.layers, newest)
                self._member.capturing.gate()
            elif joiners:
                self._welcome(group, [rank for rank, row in enumerate(rows) if row[0]], joiners)
            if not held.has_state:
                self._member.state_received(self.plan, newest)
        group.minimum([0])
        return newest, caught_up

    def _restore(self, group: Group, restore: Restore) -> int:
        """Everybody takes the snapshot's state instead of their own, as far as they have one."""
        self._member.turns.wait_until_parked(self.plan.generation)
        if self.plan.stages:
            self._member.capturing.gate()
            with self._member.turns.changing(self.plan.generation):
                self._member.stage.begin_anew(self.plan, self.rank)
        table = self._member.fetch(restore, self.plan)
        self._member.turns.load(self.plan.generation, table)
        if self.plan.stages:
            Moving(self._member, self.plan, self.rank, group).compare_restored()
        complete = restore.key.step - 1
        self._member.capturing.trust(Ordinal(self.plan.branch, restore.key.step))
        self._member.state_received(self.plan, complete)
        group.minimum([0])
        return complete

    def _learn_outcome(self, group: Group, held: Holding, newest: int) -> Payload | None:
        """In a pipeline of several stages whoever is behind has its own stage's sums: nobody has the complete result
        before all have these. What is lacking is what others know of the step."""
        sums = self._member.sums
        known = held.kept.outcome if held.kept is not None and held.complete == newest else None
        nothing = [NOBODYS] * (1 + sums.micro_batches + len(sums.names))
        low = group.minimum(nothing if known is None else known.row())
        if held.complete == newest:
            return None
        assert held.reduced is not None, f"neither has step {newest} been completed here, nor this stage's part of it"
        held.reduced.outcome = Outcome.of(low, sums.micro_batches)
        return held.reduced

    def _catch_up(self, group: Group, held: Holding, holders: Sequence[int], behind: Sequence[int]) -> Payload | None:
        """Those behind receive the kept result, each holder sending its slice of the bytes."""
        if self.rank in behind:
            result = self._taken(self._member.sums.pool.take())
            counts = torch.zeros(len(result.counts), dtype=torch.int64)
            moves: list[Move] = []
            for part, holder in zip(_parts(result.flat.numel(), len(holders)), holders, strict=True):
                moves += [Move(data=result.flat[a:b], peer=holder, tag=KEPT_TAG + 1) for a, b in part]
            coming = group.post([], moves)
            group.post_host([], [Move(data=counts.view(torch.uint8), peer=holders[0], tag=KEPT_TAG)]).wait()
            coming.wait()
            result.counts = [int(count) for count in counts.tolist()]
            self._in_flight = None
            return result
        if self.rank in holders:
            assert held.kept is not None
            place = holders.index(self.rank)
            counts = torch.tensor(held.kept.counts, dtype=torch.int64)
            mine = _parts(held.kept.flat.numel(), len(holders))[place]
            told = [Move(data=counts.view(torch.uint8), peer=peer, tag=KEPT_TAG) for peer in behind if place == 0]
            sends = [Move(data=held.kept.flat[a:b], peer=peer, tag=KEPT_TAG + 1) for peer in behind for a, b in mine]
            leaving = group.post(sends, [])
            group.post_host(told, []).wait()
            leaving.wait()
        return None

    def _welcome(self, group: Group, holders: Sequence[int], joiners: Sequence[int]) -> None:
        """Joiners receive the state at this boundary, in disjoint slices from all that hold it.

        At the very first formation everybody may have built the same state: then nothing is sent.
        """
        if self.plan.kind == "initial":
            mine = capture(self._member.objects())
            digest = mine.digest()
            halves = [int(digest[:15], 16), int(digest[15:30], 16)]
            if len({tuple(row) for row in group.gather(halves)}) == 1:
                return
        elif self.rank in holders:
            mine = self._member.turns.held_state(self.plan.generation)
        if self.rank in holders:
            self._send_state(group, mine, holders, joiners)
            # A newer generation may have changed the state meanwhile: then nobody must see this one formed.
            self._member.turns.require_current(self.plan.generation)
        else:
            self._member.turns.load(self.plan.generation, self._receive_state(group, holders))

    def _send_state(self, group: Group, table: StateTable, holders: Sequence[int], joiners: Sequence[int]) -> None:
        place = holders.index(self.rank)
        if place == 0:
            text = torch.frombuffer(bytearray(table.skeleton), dtype=torch.uint8)
            length = torch.tensor([len(table.skeleton)]).view(torch.uint8)
            group.post_host([Move(data=length, peer=peer, tag=STATE_TAG) for peer in joiners], []).wait()
            group.post_host([Move(data=text, peer=peer, tag=STATE_TAG + 1) for peer in joiners], []).wait()
        for start, stop in _parts(table.nbytes, len(holders))[place]:
            pieces = [piece.cpu() for piece in table.pieces(start, stop)]
            group.post_host(
                [Move(data=piece, peer=peer, tag=STATE_TAG + 2) for peer in joiners for piece in pieces], []
            ).wait()

    def _receive_state(self, group: Group, holders: Sequence[int]) -> StateTable:
        length = torch.zeros(1, dtype=torch.int64)
        group.post_host([], [Move(data=length.view(torch.uint8), peer=holders[0], tag=STATE_TAG)]).wait()
        text = torch.empty(int(length), dtype=torch.uint8)
        group.post_host([], [Move(data=text, peer=holders[0], tag=STATE_TAG + 1)]).wait()
        table = StateTable.empty(text.numpy().tobytes())
        moves = [
            Move(data=piece, peer=holder, tag=STATE_TAG + 2)
            for part, holder in zip(_parts(table.nbytes, len(holders)), holders, strict=True)
            for start, stop in part
            for piece in table.pieces(start, stop)
        ]
        group.post_host([], moves).wait()
        return table

    # The exchange

    def _exchange(self, group: Group, step: int) -> None:
        sums, member = self._member.sums, self._member
        wish = member.capturing.wish(self.plan, step)
        lane = StepLane(
            newest=member.newest_held(self.plan.generation),
            control=member.control_digest(),
            buffers=sums.buffers_digest(),
            layout=sums.fingerprint(),
            mask=sums.mask(),
            spelled_anew=member.spelled_anew(),
            wish=wish,
        )
        stages = max(1, len(self.plan.stages))
        low = AgreedLane.of(group.minimum(lane.row(self.plan.stage_number(self.rank), stages)), stages)
        if self.plan.stages:
            member.stage.all_through()
        if low.control_differs:  # the user's code has set other values; bits that change by themselves are rarer
            _explain_difference(group, member.control_state(), step)
        member.capturing.agreed(self.plan, step, low.snapshot)
        if low.snapshot.differs:
            mine = [NOBODYS if wish.digest is None else wish.digest, member.capturing.verified(self.plan)]
            member.state_differs(self.plan, step, gathered(group, mine, self.rank, [NOBODYS, -1]))
            return
        if low.layouts_differ:
            names = [json.loads(text) for text in group.gather_bytes(json.dumps(sums.known_buffers).encode())]
            member.widen(self.plan.generation, [name for row in names for name in row])
        if low.spell:
            told = group.gather_bytes(member.stage.spelling())
            with member.turns.changing(self.plan.generation):
                member.stage.take_spelling(told)
        counts = self._all_counts(group) if low.masks_differ or low.layouts_differ else None
        result = self._taken(member.take_result(self.plan.generation))
        sums.partial.freeze()
        nodes = dict(sums.partial.nodes)
        if member.reduction == "fast":
            exchange_fast(group, nodes, result)
        else:
            exchange(group, self.plan, nodes, result, self._scratch, counts)
        if len(self.plan.stages) > 1:
            close_step(group, self.plan, member.stage.uses, sums, result, self._stage_done)
        self._in_flight = None
        member.exchanged(self.plan, step, low.newest, low.snapshot, result)

    def _stage_done(self, result: Payload) -> None:
        """From here on nobody writes into it any more. Not while the generation is left behind: what is in flight then
        is given up, and must not be what others believe that this rank has."""
        with self._member.turns.staying(self.plan.generation):
            self.reduced, self._in_flight = result, None

    def _all_counts(self, group: Group) -> dict[Node, list[int]]:
        """Which tensors each root holds, of all ranks: asked for only when they differ."""
        mine = [[node.start, node.stop, counts] for node, counts in self._member.sums.counts().items()]
        rows = group.gather_bytes(json.dumps(mine).encode())
        own = [json.loads(rows[rank]) for rank in self.plan.team(self.rank)]
        return {Node(start, stop): counts for row in own for start, stop, counts in row}


def _parts(nbytes: int, ways: int) -> list[list[tuple[int, int]]]:
    """Bytes cut into `ways` ranges, each cut into chunks."""
    cuts = [nbytes * way // ways for way in range(ways + 1)]
    return [
        [(at, min(at + CHUNK_BYTES, stop)) for at in range(start, stop, CHUNK_BYTES)] for start, stop in pairwise(cuts)
    ]


def _explain_difference(group: Group, mine: dict[str, object], step: int) -> None:
    rows = [json.loads(text) for text in group.gather_bytes(json.dumps(mine, default=repr).encode())]
    for rank, row in enumerate(rows):
        for name in sorted({*rows[0], *row}):
            if rows[0].get(name) != row.get(name):
                one, other = (each.get(name, "absent") for each in (rows[0], row))
                raise StateDiverged(
                    f"step {step}: {name} is {one} on rank 0 and {other} on rank {rank}; "
                    "it must be computed from values that are equal on all ranks, such as run.step, run.reduced"
                    '("loss") or what is in run.state: a Python variable of the script is not handed to a rank that '
                    "takes a lost one's place. What one rank does alone, such as validation, belongs into `with "
                    "run.evaluating():`"
                )
    raise StateDiverged(f"step {step}: control state differs between ranks in a way that cannot be shown")
