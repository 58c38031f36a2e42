"""The soak's own judgement: which faults are spared, what counts as a leak."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from resilient.faults import KINDS, Act, Kind
from tests.soak.leaks import PRIVATE_MIB, Limit, Samples, growth, judged, shared_mib, slope_a_minute
from tests.soak.loop import last_step, tell_last_step
from tests.soak.rules import MOST_FAULTS_WITHOUT_A_STEP, WEIGHTS, Standing, why_spared


def act(kind: Kind) -> Act:
    return Act(kind=kind, why="")


def test_every_kind_has_a_weight_and_a_kill_is_the_commonest() -> None:
    assert set(WEIGHTS) == set(KINDS) and max(WEIGHTS, key=lambda kind: WEIGHTS[kind]) == "kill"


@pytest.mark.parametrize("kind", list(KINDS))
def test_nothing_is_spared_that_a_run_promises_to_survive(kind: Kind) -> None:
    assert why_spared(act(kind), Standing(nodes=4, unanswered=0, durable=True)) == ""


def test_what_nobody_could_survive_is_spared() -> None:
    assert "3 nodes are up" in why_spared(act("node"), Standing(nodes=3, unanswered=0, durable=True))
    assert why_spared(act("kill"), Standing(nodes=3, unanswered=0, durable=True)) == ""
    assert "durable" in why_spared(act("all"), Standing(nodes=4, unanswered=0, durable=False))
    tired = Standing(nodes=4, unanswered=MOST_FAULTS_WITHOUT_A_STEP, durable=True)
    assert "since the last step" in why_spared(act("keeper"), tired)


def samples(seconds: int, a_minute: float, *, noise: float = 0.0) -> Samples:
    source = random.Random(1)
    return [(1000.0 + second, 50 + a_minute * second / 60 + noise * source.random()) for second in range(seconds)]


def test_slopes() -> None:
    rising = samples(300, 4.0)
    assert slope_a_minute(rising) == pytest.approx(4.0)
    assert growth(rising) == pytest.approx(4.0 * 150 / 60)
    assert slope_a_minute(samples(2, 4.0)) == slope_a_minute([(1.0, 1.0)] * 5) == 0.0


@pytest.mark.parametrize(
    ("found", "leak"),
    [
        (samples(600, 4.0, noise=3.0), True),
        (samples(600, 0.0, noise=30.0), False),
        (samples(600, 1.0), False),  # slow
        (samples(150, 4.0), False),  # little as yet
        ([*samples(90, 60.0), *((1090.0 + second, 140.0) for second in range(200))], False),  # while it loads
    ],
)
def test_a_leak_rises_steadily_and_by_much(found: Samples, leak: bool) -> None:
    verdict = judged(found, PRIVATE_MIB)
    assert verdict is not None and verdict["leak"] is leak, verdict


def test_a_step_is_no_leak_however_late_it_comes() -> None:
    step = [(float(second), 60.0 if second < 90 else 77.0) for second in range(140)]
    verdict = judged(step, PRIVATE_MIB)
    assert verdict is not None and not verdict["leak"] and verdict["growth"] > PRIVATE_MIB.growth


def test_short_lives_are_not_judged() -> None:
    assert judged(samples(110, 100.0), Limit(a_minute=1.0, growth=1.0)) is None


def test_the_last_step_is_told_by_a_file(tmp_path: Path) -> None:
    end = tmp_path / "last-step"
    assert last_step(str(end)) == float("inf")
    tell_last_step(end, 41)
    assert last_step(str(end)) == 41 and [path.name for path in tmp_path.iterdir()] == ["last-step"]


def test_files_in_shared_memory_are_added_up(tmp_path: Path) -> None:
    for name in ("soak-1-a", "soak-1-b", "other-1-a"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rank-1.slot-0").write_bytes(bytes(1 << 19))
    assert shared_mib(tmp_path, "soak-") == 1.0
