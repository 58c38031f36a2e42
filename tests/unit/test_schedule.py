"""In which order a rank goes through its micro-batches: never stuck, and no more under way than allowed."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilient.core.planner import even_runs
from resilient.core.schedule import KINDS, Backward, Forward, Kind, choose, turns_of, under_way_limit


class Pipe:
    """All stages of a pipeline. Every action takes one tick; what is sent is there at the next."""

    def __init__(self, kind: Kind, owners: list[list[int]], sizes: list[tuple[int, int]]) -> None:
        """owners: by stage, of each micro-batch, the rank within the stage. sizes: of each stage, layers and ranks."""
        self.kind, self.owners, self.sizes = kind, owners, sizes
        ranks = [count for _, count in sizes]
        self.micro_batches = len(owners[0])
        self.turns = turns_of(self.micro_batches)
        places = [(stage, rank) for stage, count in enumerate(ranks) for rank in range(count)]
        self.fresh = {
            place: {b for b in range(self.micro_batches) if owners[place[0]][b] == place[1]} for place in places
        }
        self.under_way: dict[tuple[int, int], set[int]] = {place: set() for place in places}
        self.inputs = [set(range(self.micro_batches)), *(set[int]() for _ in ranks[1:])]
        self.gradients = [set[int]() for _ in ranks]
        self.most = dict.fromkeys(places, 0)
        self.ticks = 0

    def tick(self) -> bool:
        """Whether anybody did anything."""
        arrived: list[tuple[set[int], int]] = []
        did = False
        for (stage, rank), fresh in self.fresh.items():
            under_way, last = self.under_way[stage, rank], stage == len(self.sizes) - 1
            action = choose(
                under_way_limit(self.kind, self.sizes[stage:], self.micro_batches),
                fresh=fresh,
                under_way=under_way,
                inputs=self.inputs[stage],
                gradients=self.gradients[stage],
                turns=self.turns,
            )
            did = did or action is not None
            match action:
                case Forward(leaf=leaf):
                    fresh.remove(leaf)
                    under_way.add(leaf)
                    arrived.append((self.gradients[stage] if last else self.inputs[stage + 1], leaf))
                    self.most[stage, rank] = max(self.most[stage, rank], len(under_way))
                case Backward(leaf=leaf):
                    under_way.remove(leaf)
                    arrived += [(self.gradients[stage - 1], leaf)] if stage else []
        for where, leaf in arrived:
            where.add(leaf)
        self.ticks += 1
        return did

    @property
    def done(self) -> bool:
        return not any(self.fresh.values()) and not any(self.under_way.values())


@st.composite
def pipes(draw: st.DrawFn) -> Pipe:
    ranks = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    micro_batches = draw(st.integers(max(ranks), 12))
    owners = [
        draw(st.lists(st.integers(0, count - 1), min_size=micro_batches, max_size=micro_batches)) for count in ranks
    ]
    sizes = [(draw(st.integers(1, 3)), count) for count in ranks]
    return Pipe(draw(st.sampled_from(KINDS)), owners, sizes)


@given(pipes())
@settings(max_examples=300, deadline=None)
def test_it_comes_to_an_end_whoever_owns_what(pipe: Pipe) -> None:
    while pipe.tick():
        assert pipe.ticks < 1000
    assert pipe.done


@given(pipes())
@settings(max_examples=100, deadline=None)
def test_no_more_are_under_way_than_allowed(pipe: Pipe) -> None:
    while pipe.tick():
        pass
    for (stage, rank), most in pipe.most.items():
        assert most <= under_way_limit(pipe.kind, pipe.sizes[stage:], pipe.micro_batches), (stage, rank)


@pytest.mark.parametrize(("stages", "micro_batches"), [(1, 4), (2, 4), (4, 8), (4, 32)])
def test_the_bubble_of_an_even_pipeline_is_the_known_one(stages: int, micro_batches: int) -> None:
    """Of a step's 2 M + 2 (S - 1) slots, one for each forward and each backward, every rank is idle in 2 (S - 1)."""
    pipe = Pipe("1f1b", [[0] * micro_batches for _ in range(stages)], [(1, 1)] * stages)
    while not pipe.done:
        pipe.tick()
    assert pipe.ticks == 2 * micro_batches + 2 * (stages - 1)


def test_forward_first_as_long_as_more_may_be_under_way() -> None:
    both = {"fresh": {1}, "under_way": {0}, "inputs": {1}, "gradients": {0}, "turns": (0, 1)}
    assert choose(2, **both) == Forward(1)
    assert choose(1, **both) == Backward(0)
    assert choose(1, fresh={1}, under_way={0}, inputs={1}, gradients=(), turns=(0, 1)) is None


def test_fewer_are_under_way_where_all_stages_that_follow_are_as_large() -> None:
    def limits(*sizes: tuple[int, int]) -> list[int]:
        return [under_way_limit("1f1b", sizes[stage:], 32) for stage in range(len(sizes))]

    assert limits((5, 2), (5, 2), (5, 2)) == [4, 3, 1]
    assert limits((5, 1), (5, 3), (5, 3)) == [15, 3, 1]
    assert limits((6, 2), (5, 2), (5, 2)) == [7, 3, 1]
    assert under_way_limit("gpipe", [(5, 2)] * 3, 32) == 32


@pytest.mark.parametrize("micro_batches", [1, 2, 8, 31, 1000])
def test_whoever_owns_a_run_of_micro_batches_has_had_its_part_of_the_turns_at_any_time(micro_batches: int) -> None:
    turns = turns_of(micro_batches)
    assert sorted(turns) == list(range(micro_batches))
    for ranks in range(1, min(micro_batches, 8) + 1):
        for run in even_runs(micro_batches, ranks):
            for now in range(0, micro_batches, 1 + micro_batches // 50):
                had = sum(turns[leaf] <= now for leaf in run)
                assert abs(had - (now + 1) * len(run) / micro_batches) <= 3


def test_all_ranks_of_the_widest_stage_have_something_to_do_from_the_beginning() -> None:
    turns = turns_of(8)
    assert sorted(range(8), key=turns.__getitem__) == [0, 5, 2, 7, 4, 1, 6, 3]
    pipe = Pipe("1f1b", [[0] * 8, [0] * 4 + [1] * 4], [(1, 1), (1, 2)])
    while not pipe.done:
        pipe.tick()
    assert pipe.ticks == 16, "the first stage has 16 things to do"
