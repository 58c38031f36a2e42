"""Where a run's time goes: every second in one state, none taken back."""

from __future__ import annotations

import random

from resilient.core.spent import STATES, Interruption, Spent

DIED = Interruption(detect_s=2.0, form_s=0.5, restored=False, planned=False)


def begun(steps: int = 1) -> Spent:
    """A run whose first step was committed at 5, and further ones each second."""
    spent = Spent()
    spent.look(0.0, waits=False)
    for step in range(steps):
        spent.committed(step, 5.0 + step, 1.0)
    return spent


def told(spent: Spent) -> dict[str, float]:
    return {state: round(seconds, 9) for state, seconds in spent.seconds.items() if seconds}


def test_before_the_first_step_it_starts_and_then_it_is_productive() -> None:
    assert told(begun(3)) == {"starting": 5.0, "productive": 2.0}


def test_steps_that_are_heard_of_together_are_productive_all() -> None:
    spent = begun()
    spent.committed(4, 9.0, 1.0)
    assert told(spent) == {"starting": 5.0, "productive": 4.0}


def test_a_death_costs_detection_forming_and_what_is_computed_again() -> None:
    spent = begun(2)  # at 6
    spent.committed(2, 10.0, 1.0, DIED)
    assert told(spent) == {"starting": 5.0, "productive": 2.0, "detecting": 2.0, "forming": 0.5, "replaying": 0.5}


def test_steps_that_were_gone_back_on_are_replayed() -> None:
    spent = begun(4)  # step 3 at 8
    back = Interruption(detect_s=0.0, form_s=1.0, restored=True, planned=False)
    spent.committed(2, 10.0, 1.0, back)
    spent.committed(3, 11.0, 1.0)
    spent.committed(4, 12.0, 1.0)
    assert told(spent) == {"starting": 5.0, "productive": 4.0, "restoring": 1.0, "replaying": 2.0}


def test_a_planned_change_costs_what_it_delayed() -> None:
    spent = begun(2)
    joined = Interruption(detect_s=0.0, form_s=0.9, restored=False, planned=True)
    spent.committed(2, 7.25, 1.0, joined)
    assert told(spent) == {"starting": 5.0, "productive": 2.0, "forming": 0.25}


def test_waiting_for_nodes_shows_while_it_lasts_and_is_no_part_of_forming() -> None:
    spent = begun(2)  # at 6
    spent.look(8.0, waits=True)
    spent.look(20.0, waits=True)
    assert told(spent)["waiting"] == 12.0
    spent.look(30.0, waits=False)
    spent.committed(2, 32.0, 1.0, Interruption(detect_s=1.0, form_s=24.0, restored=False, planned=False))
    assert told(spent) == {
        "starting": 5.0,
        "productive": 2.0,
        "detecting": 1.0,
        "forming": 2.0,
        "waiting": 22.0,
    }


def test_what_snapshots_blocked_is_not_productive() -> None:
    spent = begun(2)
    spent.blocked(0.25)
    spent.committed(2, 7.0, 1.0)
    spent.blocked(0.125)  # of another rank 0, which has begun anew
    spent.committed(3, 8.0, 1.0)
    assert told(spent) == {"starting": 5.0, "productive": 1.0 + 0.75 + 0.875, "blocked": 0.375}


def test_a_controller_that_came_back_goes_on_from_what_is_on_record() -> None:
    former = begun(3)
    spent = Spent()
    spent.take_up(former.seconds, 2, former.pending_s + 2.0)
    spent.look(100.0, waits=False)
    spent.committed(5, 101.0, 0.0)
    assert told(spent) == {"starting": 5.0, "productive": 5.0}


def test_every_second_is_in_one_state_and_stays_there() -> None:
    for seed in range(300):
        rng = random.Random(seed)
        spent, now, complete, began = Spent(), 0.0, -1, 0.0
        spent.look(began, waits=False)
        before = dict(spent.seconds)
        for _ in range(60):
            now += rng.expovariate(1.0)
            if rng.random() < 0.3:
                spent.look(now, waits=rng.random() < 0.5)
            elif rng.random() < 0.3:
                spent.blocked(rng.random())
            else:
                complete = max(0, complete + rng.choice((1, 1, 1, 2, -3)))
                cause = Interruption(
                    detect_s=rng.random() * 3,
                    form_s=rng.random() * 3,
                    restored=rng.random() < 0.3,
                    planned=rng.random() < 0.3,
                )
                spent.committed(complete, now, rng.random(), cause if rng.random() < 0.5 else None)
            assert all(spent.seconds[state] >= before[state] for state in STATES), seed
            before = dict(spent.seconds)
        spent.committed(complete + 1, now, 1.0)
        assert abs(sum(spent.seconds.values()) - (now - began)) < 1e-6, seed
