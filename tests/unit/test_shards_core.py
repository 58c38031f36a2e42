"""Who owns which chunk, by the plan and by what ranks hold; and which bytes of a state that is."""

from __future__ import annotations

from resilient.core.plan import Address, Place, Plan, Stage
from resilient.core.planner import even_runs
from resilient.core.shards import chunks_from, cuts_of, deal, spelled_chunks
from resilient.whereabouts import Whereabouts
from snapshot.core.ranges import common, merged
from snapshot.skeleton import TensorSpec
from tests.stages import small_chunks

CUTS = cuts_of([("layers.0.w", 4000, 4), ("layers.1.w", 1024, 4), ("layers.1.b", 5, 4)], 1024)
NEEDED = [{"layers.0.w"}, {"layers.0.w", "layers.1.w", "layers.1.b"}]
"""The first one is used by both stages."""


def plan(*stages: tuple[int, ...], emptied: tuple[int, ...] = ()) -> Plan:
    size = sum(map(len, stages))
    return Plan(
        generation=1,
        base=0,
        kind="initial",
        places=tuple(Place(member=10 + rank, node="node", address=Address(host="", port=0)) for rank in range(size)),
        leaves=tuple(run for ranks in stages for run in even_runs(4, len(ranks))),
        micro_batches=4,
        joiners=(),
        reason="",
        stages=tuple(Stage(first=number, stop=number + 1, ranks=ranks) for number, ranks in enumerate(stages)),
        sharded=True,
        emptied=emptied,
    )


def test_parameters_are_cut_at_multiples_of_the_chunk() -> None:
    cut = CUTS["layers.0.w"]
    assert list(cut.numbers) == [0, 1, 2, 3] and cut.span(3) == (3072, 4000)
    assert [list(each.numbers) for each in CUTS.values()] == [[0, 1, 2, 3], [4], [5]]
    assert cut.runs({0, 1, 3, 4}) == ((0, 2048), (3072, 4000))
    assert cut.runs({4, 5}) == ()


def test_every_chunk_has_one_owner_in_each_stage_that_needs_it() -> None:
    dealt = deal(plan((0, 1), (2, 3)), CUTS, NEEDED)
    assert [sorted(owners) for owners in dealt.owners] == [[0, 1, 2, 3], [0, 1, 2, 3, 4, 5]]
    assert dealt.of(10) | dealt.of(11) == {0, 1, 2, 3} and not dealt.of(10) & dealt.of(11)
    assert dealt.of(12) | dealt.of(13) == set(range(6)) and not dealt.of(12) & dealt.of(13)


def test_chunks_stay_with_those_that_hold_them() -> None:
    """Unless somebody would have too many; what a rank of another stage holds does not count."""
    held = [{1, 3}, {0, 2}, {1, 2}, {0, 3, 4, 5}]
    dealt = deal(plan((0, 1), (2, 3)), CUTS, NEEDED, held)
    assert dealt.of(10) == {1, 3} and dealt.of(11) == {0, 2}
    assert dealt.of(12) >= {1, 2} and dealt.of(13) >= {0, 3}


def test_whoever_is_to_leave_owns_nothing_unless_it_is_alone() -> None:
    held = [{0, 1}, {2, 3}, set(range(6))]
    dealt = deal(plan((0, 1), (2,), emptied=(11, 12)), CUTS, NEEDED, held)
    assert dealt.of(10) == {0, 1, 2, 3} and dealt.of(11) == set()
    assert dealt.of(12) == set(range(6))


def test_what_ranks_tell_each_other() -> None:
    for chunks in (set(), {0}, {0, 1, 2}, {3, 5, 6, 7, 900}):
        assert chunks_from(spelled_chunks(chunks)) == chunks


def spec(name: str, *shape: int, dtype: str = "float32", itemsize: int = 4) -> TensorSpec:
    return TensorSpec(
        name=name, dtype=dtype, itemsize=itemsize, shape=shape, order=tuple(range(len(shape))), device="cpu", shard=None
    )


SPECS = [
    spec("user:model.layers.0.w", 40, 100),
    spec("user:model.layers.1.w", 1024),
    spec("user:optimizer group 0 parameter 0['step']"),
    spec("user:optimizer group 0 parameter 0['mean']", 40, 100, dtype="bfloat16", itemsize=2),
    spec("user:optimizer group 0 parameter 1['mean']", 1024),
    spec("run.state", 3),
]
WHEREABOUTS = Whereabouts(
    layers={
        "user:model.layers.0.w": (0, 1),
        "user:model.layers.1.w": (1,),
        "user:optimizer group 0 parameter 0": (0, 1),
        "user:optimizer group 0 parameter 1": (1,),
    },
    cuts={
        "user:optimizer group 0 parameter 0": CUTS["layers.0.w"],
        "user:optimizer group 0 parameter 1": CUTS["layers.1.w"],
    },
)
STEP = 4 * 5024
MEAN = STEP + 4
END = MEAN + 2 * 4000 + 4 * 1024 + 12


def test_which_bytes_a_rank_has() -> None:
    assert WHEREABOUTS.held(SPECS, range(1)) == ((0, 16000), (END - 12, END))
    assert WHEREABOUTS.held(SPECS, range(1, 2)) == ((0, STEP), (END - 12, END))
    assert WHEREABOUTS.owned(SPECS, {1, 3}) == (
        (STEP, MEAN),
        (MEAN + 2048, MEAN + 4096),
        (MEAN + 6144, MEAN + 8000),
    )
    assert WHEREABOUTS.owned(SPECS, {4}) == ((MEAN + 8000, END - 12),)
    assert WHEREABOUTS.owned(SPECS, set()) == ()


def test_every_byte_is_captured_once_and_of_shards_by_its_owner() -> None:
    seats = plan((0, 1), (2, 3))
    dealt = deal(seats, CUTS, NEEDED)
    with small_chunks(1024):
        shares = []
        for rank, member in enumerate(seats.members):
            owners = {chunk: seats.rank_of(owner) for chunk, owner in dealt.owners[seats.stage_number(rank)].items()}
            shares.append(WHEREABOUTS.captured(SPECS, seats, rank, owners))
            held = WHEREABOUTS.owned(SPECS, dealt.of(member))
            assert common(shares[-1], ((STEP, END - 12),)) == common(shares[-1], held), "its own"
    assert merged(each for share in shares for each in share) == ((0, END),)
    assert sum(stop - start for share in shares for start, stop in share) == END
