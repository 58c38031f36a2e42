"""A state in parts, each held by another, against the state as a whole."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from snapshot.capture import capture
from snapshot.core import ranges
from snapshot.core.digest import state_digest
from snapshot.core.ranges import Ranges
from snapshot.load import load
from snapshot.recapture import Recapture
from tests.checkpoints import build
from tests.stages import bytes_in, filled, others, places, small_chunks, spread, take_away, trained, whole_chunks

LIMIT = 30

some_bytes = st.sets(st.integers(0, LIMIT - 1))
some_pairs = st.lists(st.tuples(st.integers(0, LIMIT), st.integers(0, LIMIT)).map(lambda two: tuple(sorted(two))))


def of_set(numbers: set[int]) -> Ranges:
    return ranges.merged((number, number + 1) for number in numbers)


def set_of(pairs: Ranges) -> set[int]:
    return {number for start, stop in pairs for number in range(start, stop)}


# Ranges


@given(numbers=some_bytes)
def test_equal_sets_are_equal_ranges(numbers: set[int]) -> None:
    found = of_set(numbers)
    ranges.check_ranges(found, LIMIT)
    assert set_of(found) == numbers and ranges.size_of(found) == len(numbers)
    for number, offset in zip(sorted(numbers), range(len(numbers)), strict=True):
        assert ranges.offset_of(found, number) == offset and ranges.byte_at(found, offset) == number


@given(pairs=some_pairs)
def test_merging(pairs: list[tuple[int, int]]) -> None:
    assert ranges.merged(pairs) == of_set(set_of(tuple(pairs)))


@given(one=some_bytes, other=some_bytes, start=st.integers(0, LIMIT), stop=st.integers(0, LIMIT))
def test_what_is_in_both(one: set[int], other: set[int], start: int, stop: int) -> None:
    assert ranges.common(of_set(one), of_set(other)) == of_set(one & other)
    assert ranges.clipped(of_set(one), start, stop) == of_set(one & set(range(start, stop)))
    assert ranges.holds(of_set(one), start, stop) == (set(range(start, stop)) <= one)


@given(pairs=some_pairs, stop=st.integers(0, LIMIT))
def test_every_byte_once(pairs: list[tuple[int, int]], stop: int) -> None:
    pairs = [pair for pair in pairs if pair[0] < pair[1]]
    numbers = sorted(number for pair in pairs for number in range(*pair))
    uneven = ranges.first_uneven(pairs, stop)
    assert (uneven is None) == (numbers == list(range(stop)))
    if uneven is not None:
        assert set(range(min(uneven[0], stop))) <= set(numbers)


@given(cuts=st.sets(st.integers(1, LIMIT - 1)))
def test_cuts_are_even(cuts: set[int]) -> None:
    assert ranges.first_uneven(reversed(list(pairwise([0, *sorted(cuts), LIMIT]))), LIMIT) is None


@pytest.mark.parametrize(
    "wrong",
    [None, [(0, 1)], ((0, 1, 2),), ([0, 1],), ((0, 0),), ((1, 0),), ((-1, 2),), ((0, 2), (2, 3)), ((3, 4), (0, 1)),
     ((0, LIMIT + 1),), ((0.0, 1),), ((False, 1),), ((0, 3), (2, 5))],
)  # fmt: skip
def test_other_ranges_are_refused(wrong: object) -> None:
    with pytest.raises(ValueError, match="ranges: "):
        ranges.check_ranges(wrong, LIMIT)


# States


@st.composite
def some_ranges(draw: st.DrawFn, nbytes: int) -> Ranges:
    """Of elements of up to 8 bytes."""
    cuts = sorted(draw(st.sets(st.integers(0, nbytes // 8), max_size=12)))
    return ranges.merged((8 * start, 8 * stop) for start, stop in list(pairwise(cuts))[draw(st.integers(0, 1)) :: 2])


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_part_is_captured_as_the_whole_would_be(data: st.DataObject) -> None:
    parts = trained()
    whole = capture(parts)
    expected = bytes_in(whole, ((0, whole.nbytes),))
    skeleton, starts = whole.skeleton, places(parts, whole)
    spans = ranges.merged((starts[name], starts[name] + tensor.nbytes) for name, tensor in spread(parts))
    kept = data.draw(some_ranges(whole.nbytes))
    del whole
    take_away(parts, starts, kept)
    recapture = Recapture()
    for table in (capture(parts), recapture.capture(parts), recapture.capture(parts)):
        assert table.skeleton == skeleton
        held = table.held_ranges()
        here = set_of(held)
        assert set_of(kept) <= here and here & set_of(spans) == set_of(kept) & set_of(spans)
        assert bytes_in(table, held) == b"".join(expected[start:stop] for start, stop in held)
    assert recapture.full == 1


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_part_is_loaded_from_a_part(data: st.DataObject) -> None:
    source, target = trained(), trained(1)
    whole = capture(source)
    expected = bytes_in(whole, ((0, whole.nbytes),))
    take_away(target, places(source, whole), data.draw(some_ranges(whole.nbytes)))
    needed, more = capture(target).held_ranges(), data.draw(some_ranges(whole.nbytes))
    load(target, filled(whole.skeleton, ranges.merged((*needed, *more)), expected))
    found = capture(target)
    assert (found.skeleton, found.held_ranges()) == (whole.skeleton, needed)
    assert bytes_in(found, needed) == b"".join(expected[start:stop] for start, stop in needed)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_fresh_optimizer_holds_what_the_table_does(data: st.DataObject) -> None:
    source, target = trained(), build(1)
    whole = capture(source)
    expected, starts = bytes_in(whole, ((0, whole.nbytes),)), places(source, whole)
    states = ((starts[name], tensor.nbytes) for name, tensor in spread(source) if not name.endswith(("weight", "bias")))
    elsewhere = data.draw(some_ranges(whole.nbytes))
    missing = ranges.common(ranges.merged((start, start + size) for start, size in states), elsewhere)
    held = others(missing, whole.nbytes)
    load(target, filled(whole.skeleton, held, expected))
    found = capture(target)
    assert (found.skeleton, found.held_ranges()) == (whole.skeleton, held)
    assert bytes_in(found, held) == b"".join(expected[start:stop] for start, stop in held)


@settings(max_examples=15, deadline=None)
@given(data=st.data(), world=st.integers(1, 4))
def test_a_digest_from_parts_is_that_of_the_whole(data: st.DataObject, world: int) -> None:
    with small_chunks():
        whole = capture(trained())
        ends, digests = whole.chunk_ends(), {}
        twin = xxhash.xxh3_128(xxhash.xxh3_128_digest(whole.skeleton))
        for start, stop in pairwise((0, *ends)):
            twin.update(xxhash.xxh3_128_digest(bytes_in(whole, ((start, stop),))))
        owners = data.draw(st.lists(st.integers(0, world - 1), min_size=len(ends), max_size=len(ends)))
        for rank in range(world):
            parts = trained()
            mine = whole_chunks(ends, owners, rank)
            take_away(parts, places(parts, capture(parts)), mine)
            table = capture(parts)
            digests |= {start: table.chunk_digests(start, stop) for start, stop in mine}
        together = b"".join(digests[start] for start in sorted(digests))
        assert state_digest(whole.skeleton, together) == whole.digest() == twin.hexdigest()


def test_only_whole_chunks_have_digests() -> None:
    table = capture({"s": {"a": torch.ones(5), "b": torch.ones(3)}})
    assert len(table.chunk_digests(0, 32)) == 32 and table.chunk_digests(20, 20) == b""
    for start, stop in ((0, 19), (4, 20), (20, 36)):
        with pytest.raises(AssertionError, match="not whole chunks"):
            table.chunk_digests(start, stop)
    assert capture({"s": {}}).digest() == state_digest(capture({"s": {}}).skeleton, b"")
