"""What a rank keeps of the optimizer's state from plan to plan, and takes from a snapshot."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resilient.buffers import Buffers
from resilient.core.plan import Address, Place, Plan, Stage
from resilient.core.planner import even_runs
from resilient.pipeline import Pipeline
from resilient.shards import OptimizerShards
from resilient.stage_side import StageSide
from resilient.sums import StepSums
from snapshot.absent import is_absent, parts_of
from snapshot.capture import capture
from snapshot.core.ranges import merged
from snapshot.load import load
from tests.stages import bytes_in, filled, small_chunks

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def chunks() -> Iterator[None]:
    with small_chunks(1024):
        yield


def plan(generation: int, *members: int, kind: Any = "initial", base: int = 0, emptied: tuple[int, ...] = ()) -> Plan:
    return Plan(
        generation=generation,
        base=base,
        kind=kind,
        places=tuple(Place(member=member, node="n", address=Address(host="", port=0)) for member in members),
        leaves=even_runs(4, len(members)),
        micro_batches=4,
        joiners=(),
        reason="",
        stages=(Stage(first=0, stop=2, ranks=tuple(range(len(members)))),),
        sharded=True,
        emptied=emptied,
    )


class Rank:
    """One that has, or has not, the state after a step over whole parameters."""

    def __init__(self, *, trained: bool = True, build: Any = torch.optim.AdamW) -> None:
        layer = functools.partial(nn.Linear, 60, 60)
        self.pipe = Pipeline(
            [layer, layer], nn.MSELoss(), stages=1, tied={}, checkpoint=False, schedule="1f1b",
            rank_bytes=None, shard_optimizer=True, seed=0, device=CPU,
        )  # fmt: skip
        self.optimizer = build(self.pipe.parameters())
        self.shards = OptimizerShards(self.pipe, [("optimizer", self.optimizer)])
        work: Any = SimpleNamespace(seated=lambda *_: None, disturbed=lambda: None, drop=lambda: None)
        self.side = StageSide(
            "model",
            self.pipe,
            [("optimizer", self.optimizer)],
            StepSums((), Buffers([]), 4, CPU),
            work,
            self.shards,
        )
        if trained:
            self.pipe.bring(range(2), initial=True)
            drawn = torch.Generator().manual_seed(0)
            for parameter in self.pipe.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=drawn)
            self.optimizer.step()

    @property
    def objects(self) -> dict[str, object]:
        return {"user:model": self.pipe, "user:optimizer": self.optimizer}

    def held(self) -> dict[int, Tensor]:
        """Of the first layer's weight, what is here of its mean, by its first element."""
        mean = self.optimizer.state[next(self.pipe.parameters())]["exp_avg"]
        return dict(parts_of(mean)) if is_absent(mean) else {0: mean.view(-1)}


def owned(rank: Rank) -> frozenset[int]:
    assert rank.shards.seated is not None
    return rank.shards.seated.owned


def begun(member: int, *members: int) -> Rank:
    rank = Rank()
    first = plan(1, *members)
    rank.shards.deal(first)
    rank.side.bring(first, members.index(member), initial=True)
    rank.side.settle(first, members.index(member))
    return rank


def test_each_rank_keeps_what_it_owns() -> None:
    whole, ranks = Rank(), [begun(member, 7, 8, 9) for member in (7, 8, 9)]
    everything = [chunk for rank in ranks for chunk in owned(rank)]
    assert sorted(everything) == list(range(10)), "four of each weight, one of each bias"
    parts = {first: part for rank in ranks for first, part in rank.held().items()}
    assert torch.equal(torch.cat([parts[first] for first in sorted(parts)]), whole.held()[0])
    table = capture(whole.objects)
    shares = [rank.side.captured(capture(rank.objects)) for rank in ranks]
    assert merged(each for share in shares for each in share) == ((0, table.nbytes),)
    for rank, share in zip(ranks, shares, strict=True):
        assert bytes_in(capture(rank.objects), share) == bytes_in(table, share), "it holds what it captures"


def test_a_change_that_fails_is_gone_back_on() -> None:
    rank = begun(7, 7, 8)
    before, values = owned(rank), {first: part.clone() for first, part in rank.held().items()}
    joined = plan(2, 7, 8, 9, kind="planned", base=1)
    told = [rank.shards.told(), begun(8, 7, 8).shards.told(), b"[]"]
    rank.shards.deal(joined, told)
    assert rank.shards.owned(joined, 0) < before, "it gives, and gets nothing"
    rank.side.bring(joined, 0)
    again = plan(3, 7, 8, kind="unplanned", base=1)
    rank.side.carry_on(again)
    rank.side.settle(again, 0)
    assert owned(rank) == before
    assert {first: part.tolist() for first, part in rank.held().items()} == {
        first: part.tolist() for first, part in values.items()
    }


def test_a_change_that_others_have_seen_succeed_is_gone_on_with() -> None:
    rank = begun(7, 7, 8)
    joined = plan(2, 7, 8, 9, kind="planned", base=1)
    rank.shards.deal(joined, [rank.shards.told(), begun(8, 7, 8).shards.told(), b"[]"])
    rank.side.bring(joined, 0)
    expected = rank.shards.owned(joined, 0)
    for generation, base in ((3, 2), (4, 3)):  # neither has this rank seen formed
        again = plan(generation, 7, 8, 9, kind="unplanned", base=base)
        rank.side.carry_on(again)
    rank.side.settle(again, 0)
    assert owned(rank) == expected


def test_nothing_is_touched_where_nothing_changes() -> None:
    rank = begun(7, 7, 8)
    before = {first: part.data_ptr() for first, part in rank.held().items()}
    again = plan(2, 7, 8, kind="unplanned", base=1)
    rank.side.carry_on(again)
    rank.side.settle(again, 0)
    assert {first: part.data_ptr() for first, part in rank.held().items()} == before


def test_whoever_takes_over_chunks_has_memory_for_them_beside_its_own() -> None:
    rank, leaver = begun(7, 7, 8), begun(8, 7, 8)
    mine = {first: part.clone() for first, part in rank.held().items()}
    later = plan(2, 7, 8, kind="planned", base=1, emptied=(8,))
    for each in (rank, leaver):
        each.shards.deal(later, [rank.shards.told(), leaver.shards.told()])
    rank.side.bring(later, 0)
    table = capture(rank.objects)
    assert table.is_whole
    for start, stop in rank.side.whereabouts.owned(table.layout.tensors, owned(leaver)):
        sent = capture(leaver.objects)
        for into, piece in zip(table.pieces(start, stop), sent.pieces(start, stop), strict=True):
            into.copy_(piece)
    rank.side.settle(later, 0)
    leaver.side.bring(later, 1)
    leaver.side.settle(later, 1)
    assert capture(rank.objects).digest() == capture(Rank().objects).digest()
    assert leaver.held() == {} and owned(leaver) == frozenset()
    assert all(torch.equal(rank.held()[0][first : first + part.numel()], part) for first, part in mine.items())


@pytest.mark.parametrize("fresh", [True, False])
def test_a_snapshot_gives_each_rank_its_chunks(fresh: bool) -> None:
    """Whatever it had before."""
    saved = capture(Rank().objects)
    data = bytes_in(saved, ((0, saved.nbytes),))
    restored = replace(plan(5, 9, 7), stages=(Stage(first=0, stop=2, ranks=(0, 1)),))
    parts: list[Any] = []
    for place in (0, 1):
        rank = Rank(trained=False) if fresh else begun(7, 7, 8, 9)
        rank.side.begin_anew(restored, place)
        wanted = rank.side.wanted(restored, place)(saved.layout)
        load(rank.objects, filled(saved.skeleton, wanted, data))
        rank.side.settle(restored, place)
        assert capture(rank.objects).skeleton == saved.skeleton
        parts += [(start, stop, rank) for start, stop in rank.side.captured(capture(rank.objects))]
    found = b"".join(
        bytes_in(capture(rank.objects), ((start, stop),))
        for start, stop, rank in sorted(parts, key=lambda part: part[0])
    )
    assert found == data


def test_what_cannot_be_cut_is_refused() -> None:
    layer = functools.partial(nn.Linear, 4, 4)
    for change, said in (
        (lambda pipe: setattr(pipe.layers[0], "weight", nn.Parameter(torch.ones(4, 5).t())), "has the strides"),
        (lambda pipe: setattr(pipe.layers[0], "weight", nn.Parameter(torch.empty(0, 4))), "has no elements"),
    ):
        pipe = Pipeline(
            [layer()], nn.MSELoss(), stages=1, tied={}, checkpoint=False, schedule="1f1b",
            rank_bytes=None, shard_optimizer=True, seed=0, device=CPU,
        )  # fmt: skip
        change(pipe)
        optimizer = torch.optim.AdamW(pipe.parameters())
        with pytest.raises(ValueError, match=f"layers.0.weight .*{said}.*leave shard_optimizer out"):
            OptimizerShards(pipe, [("optimizer", optimizer)])
