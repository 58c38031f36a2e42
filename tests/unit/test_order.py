"""The order of samples: fixed values, ranges, errors, and the line of tickets."""

import random
import time

import numpy as np
import pytest
import torch

from resilient.core.order import Batching, Line, derive_seed, permuted, sample_indices
from resilient.randomness import seed_everything, seed_host, single_threaded

FOUR_LEAVES = Batching(global_batch=8, micro_batch=2)


def test_seeds_are_the_same_for_ever() -> None:
    # Written down once: a change here would make every run take another course after an upgrade.
    assert derive_seed(1, "sample", 2, 3) == 0x6225_4EB7_937F_8DD4
    assert derive_seed(-1, b"x", 2**80) == 0xE462_82EB_5BB8_E85B
    assert permuted(np.arange(10), length=10, seed=0, epoch=0).tolist() == [7, 1, 5, 6, 8, 4, 0, 3, 9, 2]


def test_every_purpose_has_its_own_seed() -> None:
    purposes = [(), (1,), ("1",), (b"1",), ("a", "b"), ("ab",), ("a", "", "b"), (1, 2), (12,), (2, 1), (-1,)]
    assert len({derive_seed(*parts) for parts in purposes}) == len(purposes)
    assert derive_seed(np.int64(7), "x") == derive_seed(7, "x")


@pytest.mark.parametrize("part", [True, 1.0, None, (1,)])
def test_a_seed_is_derived_from_nothing_else(part: object) -> None:
    with pytest.raises(TypeError):
        derive_seed(part)  # type: ignore[arg-type]


def test_unshuffled_runs_through_the_dataset_and_drops_the_remainder() -> None:
    def step(number: int) -> list[int]:
        return [
            index
            for leaf in range(4)
            for index in sample_indices(FOUR_LEAVES, step=number, leaf=leaf, length=19, seed=5, shuffle=False).tolist()
        ]

    assert FOUR_LEAVES.steps_per_epoch(19) == 2
    assert [step(number) for number in range(3)] == [list(range(8)), list(range(8, 16)), list(range(8))]
    assert [FOUR_LEAVES.epoch(number, 19) for number in range(5)] == [0, 0, 1, 1, 2]


def test_any_place_is_reached_directly_however_long_the_dataset() -> None:
    found = sample_indices(FOUR_LEAVES, step=10**15, leaf=3, length=2**62, seed=1)
    assert found.dtype == np.int64
    assert found.shape == (2,)
    assert ((found >= 0) & (found < 2**62)).all()


@pytest.mark.parametrize(("step", "leaf"), [(-1, 0), (0, -1), (0, 4)])
def test_out_of_range(step: int, leaf: int) -> None:
    with pytest.raises(ValueError, match="no leaf"):
        sample_indices(FOUR_LEAVES, step=step, leaf=leaf, length=19, seed=0)


def drawn(line: Line, count: int) -> list[tuple[int, int]]:
    return [next(line) for _ in range(count)]


def test_line_runs_on_into_later_steps_and_ends_with_the_loop() -> None:
    line = Line(steps=3)
    line.redirect(1, (0, 2))
    assert list(line) == [(1, 0), (1, 2), (2, 0), (2, 2)]


def test_line_without_leaves_is_empty() -> None:
    line = Line(steps=3)
    line.redirect(0, ())
    assert list(line) == []


def test_redirected_line_draws_nothing_twice() -> None:
    line = Line(steps=10)
    line.redirect(0, (0, 1))
    assert drawn(line, 4) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    line.under_way.popleft()
    line.arrived[line.under_way.popleft()] = "batch of (0, 1)"
    line.redirect(0, (1, 2))
    assert drawn(line, 4) == [(0, 2), (1, 2), (2, 1), (2, 2)]
    line.redirect(1, (1, 2))
    assert line.arrived == {}
    assert drawn(line, 1) == [(3, 1)]


def test_line_knows_what_it_will_soon_draw() -> None:
    line = Line(steps=4)
    line.redirect(1, (0, 2))
    assert drawn(line, 2) == [(1, 0), (1, 2)]
    line.arrived[line.under_way.popleft()] = "batch of (1, 0)"
    reached = [(step, leaf) for step in range(6) for leaf in range(4) if line.reaches((step, leaf), draws=3)]
    assert reached == [(1, 2), (2, 0), (2, 2), (3, 0)]
    assert [line.reaches(ticket, draws=9) for ticket in [(3, 2), (4, 0), (1, 0)]] == [True, False, False]


def test_seeding_repeats_all_generators() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    for seed in (seed_everything, seed_host):
        seed(2**64 - 1)
        first = draw()
        other = draw()
        seed(2**64 - 1)
        assert draw() == first != other
        seed(5)
        assert draw() != first
    with pytest.raises(ValueError, match="seed64"):
        seed_everything(2**64)


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures the CPU alone")
def test_seeding_is_cheap_enough_for_every_micro_batch() -> None:
    def seconds() -> float:
        start = time.perf_counter()
        seed_everything(12345)
        return time.perf_counter() - start

    assert min(seconds() for _ in range(200)) < 50e-6


def test_single_threaded_restores_the_number_of_threads() -> None:
    before = torch.get_num_threads()
    with single_threaded():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
