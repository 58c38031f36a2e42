"""A few hundred seeds, and those that once found a mistake."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.sim.swarm import run_seed, swarm

SEEDS = 500
RARE = (732, 761, 1207, 1279, 1506, 1564, 1741, 3256, 3478, 4264)
"""Further seeds, which reach what few do."""

IMPORTANT = (
    "a change of layers was gone back on",
    "a checkpoint could not be read",
    "a checkpoint was loaded",
    "a keeper did not answer",
    "a keeper was asked what the one before it was asked",
    "a share could not be loaded",
    "all members have loaded a snapshot",
    "a joiner that had begun joined again",
    "all ranks died at once",
    "begun before layers were complete",
    "checkpoint committed",
    "capture across a planned change",
    "behind with its own sums",
    "caught up from a kept result",
    "controller killed on the way back to a snapshot",
    "controller killed while a generation formed",
    "controller killed while creating a generation",
    "controller superseded",
    "death while a result was on its way",
    "death in the middle of a drain",
    "death while forming",
    "dealt in proportion",
    "drained generation",
    "ends differed",
    "exchange completed by some members only",
    "formation seen by some members only",
    "found out by what it had to send",
    "handed over",
    "image decoded",
    "joiner died after it was seated",
    "joiner died before it was seated",
    "joiner survived a generation it had not seen formed",
    "keeper died alone",
    "layers moved",
    "link broken",
    "joined beside some that are to leave",
    "node died",
    "node died before it was drained",
    "node drained",
    "node silent",
    "one slot more",
    "parity block spoiled",
    "proposal cancelled",
    "rank asked to leave",
    "rank stopped",
    "released: nobody needs it any more",
    "restored generation",
    "run failed",
    "run finished",
    "sent again to who owns it now",
    "snapshot overtaken before it was protected",
    "snapshot protected everywhere",
    "something rotted",
    "stage lost",
    "stages by what layers take",
    "straggler evicted",
    "straggler reported",
    "the server of a kept result died",
    "the store's host died while forming",
    "two controllers",
    "what was computed ahead was dropped",
)


SILENT = ("link silent", "links probed", "run finished")


def test_links_that_fall_silent_stop_no_run() -> None:
    outcome = swarm(range(SEEDS), keep_going=True, silenced=True)
    assert outcome.failures == []
    assert [name for name in SILENT if not outcome.seen[name]] == []


def test_a_few_hundred_seeds_hold_and_reach_the_delicate_intervals() -> None:
    seen: Counter[str] = Counter()
    for drained in (False, True):  # and with that pipelines
        outcome = swarm([*range(SEEDS), *RARE], keep_going=True, drained=drained, staged=drained)
        assert not outcome.failures, f"{drained=}; replay with python -m tests.sim --seed: {outcome.failures}"
        seen += outcome.seen
    missed = [name for name in IMPORTANT if not seen[name]]
    assert not missed, f"no seed reached: {missed}"


def test_loops_that_follow_one_another() -> None:
    outcome = swarm(range(300), keep_going=True, looped=True)
    assert not outcome.failures, f"replay with python -m tests.sim --loops --seed: {outcome.failures}"
    missed = [name for name in ("a loop after a loop", "passed a loop by") if not outcome.seen[name]]
    assert not missed, f"no seed reached: {missed}"


@pytest.mark.parametrize("seed", [1021, 1513, 2270, 6334])
def test_seeds_that_found_a_mistake_between_loops(seed: int) -> None:
    _, _, error = run_seed(seed, looped=True)
    assert not error


@pytest.mark.parametrize("seed", [562, 745, 995, 3095, 3430, 4866, 9910])
def test_seeds_that_found_a_mistake(seed: int) -> None:
    _, _, error = run_seed(seed, drained=False, staged=False)  # they are older than drains
    assert not error


@pytest.mark.parametrize("seed", [174, 342, 11284, 13033, 17764, 42015])
def test_seeds_that_found_a_mistake_in_drains(seed: int) -> None:
    _, _, error = run_seed(seed, staged=False)
    assert not error


@pytest.mark.parametrize("seed", [11228, 14719, 25459, 36368, 39892, 45810, 56842, 59214, 65376, 83271, 90537, 700960])
def test_seeds_that_found_a_mistake_since(seed: int) -> None:
    _, _, error = run_seed(seed)
    assert not error
