"""What a generation's thread brings to others when its own time is over."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from actors.pending import LinkBroken
from resilient.core.difference import odd_ones
from resilient.core.lane import NOBODYS, Wish
from resilient.core.plan import Address, Place, Plan
from resilient.exact import PartialSums
from resilient.generation import GenerationThread, Holding, Superseded
from resilient.moving import gathered
from resilient.payload import Layout, Pool
from snapshot.capture import capture


def test_a_joiner_is_not_seated_with_a_state_that_was_changed_while_it_was_sent() -> None:
    """Ranks that go on without it, in a newer generation, apply the step: what they have sent is torn."""
    places = tuple(Place(member=number, node="n", address=Address(host="h", port=1)) for number in (1, 2))
    plan = Plan(
        generation=2,
        base=1,
        kind="planned",
        places=places,
        leaves=((0,), (1,)),
        micro_batches=2,
        joiners=(2,),
        reason="test",
    )
    current = [2]
    barriers: list[object] = []

    def require_current(generation: int) -> None:
        if generation != current[0]:
            raise Superseded

    def post_host(sends: Any, receives: Any) -> Any:
        current[0] = 3
        return SimpleNamespace(wait=lambda: None, follow=lambda: None)

    state = capture({"values": {"weights": torch.ones(3)}})
    turns = SimpleNamespace(held_state=lambda generation: state, require_current=require_current)
    member: Any = SimpleNamespace(number=1, turns=turns)
    group: Any = SimpleNamespace(gather=lambda row: [row, [0, -1, -1]], post_host=post_host, minimum=barriers.append)
    thread = GenerationThread(member, plan, Holding(has_state=True, complete=4, kept=None))
    with pytest.raises(Superseded):
        thread._level(group)
    assert not barriers


def test_a_stages_sums_outlive_a_formation_that_failed() -> None:
    """Another rank may have completed the step: then they are all there is of this one's stage."""
    places = (Place(member=1, node="n", address=Address(host="h", port=1)),)
    plan = Plan(
        generation=3,
        base=1,
        kind="unplanned",
        places=places,
        leaves=((0,),),
        micro_batches=1,
        joiners=(),
        reason="test",
    )
    reduced: Any = object()
    holding = Holding(has_state=True, complete=4, kept=None, reduced=reduced)
    assert GenerationThread(SimpleNamespace(number=1), plan, holding).reduced is reduced  # type: ignore[arg-type]


def test_sums_that_were_given_up_do_not_count_as_had() -> None:
    """The generation was left behind just before: its buffers are never used again, so no step may end by them."""

    @contextlib.contextmanager
    def staying(generation: int) -> Iterator[None]:
        raise Superseded
        yield

    places = (Place(member=1, node="n", address=Address(host="h", port=1)),)
    plan = Plan(
        generation=3,
        base=1,
        kind="unplanned",
        places=places,
        leaves=((0,),),
        micro_batches=1,
        joiners=(),
        reason="test",
    )
    member: Any = SimpleNamespace(number=1, turns=SimpleNamespace(staying=staying))
    thread = GenerationThread(member, plan, Holding(has_state=True, complete=4, kept=None))
    result: Any = object()
    with pytest.raises(Superseded):
        thread._stage_done(result)
    assert thread.reduced is None


def test_who_has_seen_that_states_differ_goes_back_though_the_others_can_not_be_asked() -> None:
    """Whoever it was may have been ended for it by then."""

    def broken(row: list[int]) -> list[list[int]]:
        raise LinkBroken("rank 1 has gone")

    group: Any = SimpleNamespace(size=3, gather=broken)
    assert gathered(group, [5, 7], 2, [NOBODYS, -1]) == [[NOBODYS, -1], [NOBODYS, -1], [5, 7]]
    assert odd_ones([NOBODYS, NOBODYS, 5]) == (), "nobody can be blamed"


LAYOUT = Layout.of([("weights", torch.zeros(1 << 18), "sum")])
CPU = torch.device("cpu")


class Peers:
    """The other rank, which goes away after so many transfers."""

    rank = 0

    def __init__(self, transfers: int) -> None:
        self.left = transfers
        self.sent: list[torch.Tensor] = []
        self.received: list[torch.Tensor] = []

    def minimum(self, row: list[int]) -> list[int]:
        return row

    def post(self, sends: Any, receives: Any) -> Any:
        self.sent += [move.data for move in sends]
        self.received += [move.data for move in receives]
        return SimpleNamespace(wait=self._wait, follow=self._wait)

    def _wait(self) -> None:
        if not self.left:
            raise LinkBroken("rank 1 has gone")
        self.left -= 1

    def abandon(self, held: object = None) -> None:
        pass


def break_exchange(peers: Any, partial: PartialSums) -> GenerationThread:
    """The thread of the first of two ranks, with one micro-batch each, whose exchange has broken off."""
    pool = partial.pool
    places = tuple(Place(member=number, node="n", address=Address(host="h", port=1)) for number in (1, 2))
    plan = Plan(
        generation=2,
        base=1,
        kind="unplanned",
        places=places,
        leaves=((0,), (1,)),
        micro_batches=2,
        joiners=(),
        reason="test",
    )
    sums = SimpleNamespace(
        pool=pool, partial=partial, buffers_digest=lambda: 0, fingerprint=lambda: 0, mask=lambda: 0, known_buffers=()
    )
    member: Any = SimpleNamespace(
        number=1,
        sums=sums,
        reduction="exact",
        capturing=SimpleNamespace(wish=lambda *_: Wish(), agreed=lambda *_: None),
        newest_held=lambda generation: generation,
        control_digest=lambda: 0,
        spelled_anew=lambda: False,
        take_result=lambda generation: pool.take(),
    )
    thread = GenerationThread(member, plan, Holding(has_state=True, complete=0, kept=None))
    thread.group = peers
    partial.add_leaf(0, [torch.ones(1 << 18)])
    with pytest.raises(LinkBroken):
        thread._exchange(peers, 1)
    return thread


def test_a_result_that_an_abandoned_exchange_may_still_write_into_is_never_used_again() -> None:
    peers, pool = Peers(transfers=1), Pool(LAYOUT, CPU)
    thread = break_exchange(peers, PartialSums(2, pool))
    result = StorageWeakRef(peers.received[-1].untyped_storage())  # type: ignore[no-untyped-call]
    place = peers.received[-1].untyped_storage().data_ptr()
    thread.abandon()
    taken = [pool.take().flat for _ in range(4)]
    assert all(flat.data_ptr() != place for flat in taken)
    del peers, thread
    gc.collect()
    assert not result.expired(), "its addresses are nobody else's"


def test_what_an_exchange_receives_outlives_it_when_it_is_abandoned() -> None:
    peers = Peers(transfers=0)
    thread = break_exchange(peers, PartialSums(2, Pool(LAYOUT, CPU)))
    (row,) = peers.received
    memory = StorageWeakRef(row.fill_(7).untyped_storage())  # type: ignore[no-untyped-call]
    thread.abandon()
    assert not row[4096:-4096].any(), "the pages behind it go back"
    del peers, thread, row
    gc.collect()
    assert not memory.expired()


def test_a_sum_that_an_exchange_has_sent_is_not_added_to_when_the_rest_comes_to_this_rank() -> None:
    """A rank that still follows the abandoned exchange would receive half of a newer sum."""
    peers, partial = Peers(transfers=0), PartialSums(2, Pool(LAYOUT, CPU))
    break_exchange(peers, partial).abandon()
    partial.add_leaf(1, [torch.full((1 << 18,), 2.0)])
    assert all((data.view(torch.float32) == 1).all() for data in peers.sent)
    ((_, whole),) = partial.nodes.items()
    assert (whole.views[0] == 3).all()


def test_what_is_taken_as_the_thread_is_left_behind_is_given_up() -> None:
    """Its abandoning may come between the taking from the pool and the note of it."""
    pool = Pool(LAYOUT, CPU)
    thread = break_exchange(Peers(transfers=0), PartialSums(2, pool))
    thread._in_flight = None
    thread.abandon()
    payload = pool.take()
    with pytest.raises(Superseded):
        thread._taken(payload)
    assert any(flat.data_ptr() == payload.flat.data_ptr() for flat in pool._given_up)
