"""The order of samples is a fair permutation, and no dealing of leaves loses or repeats a sample."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilient.core.order import LONGEST, Batching, Line, Ticket, permuted, sample_indices

seeds = st.integers(-(2**70), 2**70)


def epoch_order(length: int, seed: int = 0, epoch: int = 0) -> np.ndarray:
    return permuted(np.arange(length), length=length, seed=seed, epoch=epoch)


def test_bijection_for_every_small_length() -> None:
    for length in range(1, 2500):
        assert np.array_equal(np.sort(epoch_order(length, seed=length)), np.arange(length)), length


@settings(max_examples=40, deadline=None)
@given(length=st.integers(2500, 200_000), seed=seeds, epoch=st.integers(0, 10**9))
def test_bijection(length: int, seed: int, epoch: int) -> None:
    assert np.array_equal(np.sort(epoch_order(length, seed, epoch)), np.arange(length))


@settings(max_examples=100, deadline=None)
@given(length=st.integers(10_000, LONGEST), seed=seeds, data=st.data())
def test_no_two_places_of_a_huge_dataset_hold_the_same_sample(length: int, seed: int, data: st.DataObject) -> None:
    places = data.draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=300, unique=True))
    together = permuted(np.array(places), length=length, seed=seed, epoch=3)
    assert len(set(together.tolist())) == len(places)
    assert ((together >= 0) & (together < length)).all()
    # Each is reached alone, too: nothing depends on what is asked for beside it.
    assert permuted(np.array(places[-1:]), length=length, seed=seed, epoch=3)[0] == together[-1]


@given(seed=seeds, epoch=st.integers(0, 10**6))
def test_epochs_and_seeds_differ(seed: int, epoch: int) -> None:
    order = epoch_order(100, seed, epoch)
    for other in (epoch_order(100, seed, epoch + 1), epoch_order(100, seed + 1, epoch)):
        assert np.count_nonzero(order == other) < 20  # 1 is expected


def excess(observed: np.ndarray, expected: float, freedom: int) -> float:
    """By how many standard deviations chi-squared exceeds its mean."""
    return float((((observed - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5)


@pytest.mark.parametrize("length", [11, 50, 101])
def test_every_sample_is_as_likely_at_every_place(length: int) -> None:
    epochs = 2000
    at = np.zeros((length, length))
    for epoch in range(epochs):
        at[np.arange(length), epoch_order(length, 3, epoch)] += 1
    assert excess(at, epochs / length, (length - 1) ** 2) < 5


@pytest.mark.parametrize("length", [50, 1000, 4096, 100_003])
def test_neighbours_are_unrelated(length: int) -> None:
    epochs = max(2, 100_000 // length)
    jumps = np.concatenate([np.diff(epoch_order(length, 3, epoch)) % length for epoch in range(epochs)])
    bins = np.bincount((jumps - 1) * 49 // (length - 1), minlength=49)
    assert excess(bins, len(jumps) / 49, 48) < 5


@settings(max_examples=60, deadline=None)
@given(data=st.data(), micro_batch=st.integers(1, 4), leaves=st.integers(1, 8), extra=st.integers(0, 7))
def test_every_dealing_uses_every_sample_once(data: st.DataObject, micro_batch: int, leaves: int, extra: int) -> None:
    """Ranks come and go at every step; one that dies within a step has its leaves dealt out again."""
    batching = Batching(global_batch=micro_batch * leaves, micro_batch=micro_batch)
    steps = 4
    length = batching.global_batch * steps + min(extra, batching.global_batch - 1)
    used: Counter[int] = Counter()
    for step in range(steps):
        owners = data.draw(st.lists(st.integers(0, 4), min_size=leaves, max_size=leaves))
        dead = data.draw(st.sampled_from([None, *owners]))
        dealt = [leaf for rank in range(5) if rank != dead for leaf in range(leaves) if owners[leaf] == rank]
        again = [leaf for leaf in range(leaves) if owners[leaf] == dead]
        for leaf in itertools.chain(dealt, reversed(again)):
            used.update(sample_indices(batching, step=step, leaf=leaf, length=length, seed=9).tolist())
    assert set(used.values()) == {1}
    assert used.total() == steps * batching.global_batch


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_line_delivers_what_is_asked_for_whatever_came_before(data: st.DataObject) -> None:
    """Against the obvious twin: after a redirection, everything from there on is drawn, or already
    under way or arrived, and nothing is so twice."""
    steps = 6
    line = Line(steps)
    for _ in range(data.draw(st.integers(1, 5))):
        step = data.draw(st.integers(0, steps))
        leaves = tuple(sorted(data.draw(st.sets(st.integers(0, 3)))))
        line.redirect(step, leaves)
        for _ in range(data.draw(st.integers(0, 12))):
            if data.draw(st.booleans()):
                next(line, None)
            elif line.under_way:
                ticket = line.under_way.popleft()
                line.arrived[ticket] = None
        pending: list[Ticket] = [*line.under_way, *line.arrived]
        assert len(pending) == len(set(pending))
    line.redirect(step, leaves)
    wanted = {(later, leaf) for later in range(step, steps) for leaf in leaves}
    already = {*line.under_way, *line.arrived}
    assert list(line) == sorted(wanted - already)
