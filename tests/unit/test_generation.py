"""What a generation's thread brings to others when its own time is over."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from actors.pending import LinkBroken
from resilient.core.difference import odd_ones
from resilient.core.lane import NOBODYS
from resilient.core.plan import Address, Place, Plan
from resilient.generation import GenerationThread, Holding, Superseded
from resilient.moving import gathered
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
        return SimpleNamespace(wait=lambda: None)

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
