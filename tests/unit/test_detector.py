"""Verdicts, with the clock moved by hand."""

from __future__ import annotations

from resilient.core.detector import Activity, Detector, Vital

BEAT_S = 0.5


def vital(
    *,
    alive: bool = True,
    stopped: bool = False,
    activity: Activity = "computing",
    work: int = 5,
    longest_s: float = 1.0,
) -> Vital:
    return Vital(member=1, alive=alive, stopped=stopped, activity=activity, work=work, longest_s=longest_s)


def watch(detector: Detector, start: float, seconds: float, *vitals: Vital) -> list[str]:
    """Beats and looks every half second; the reasons of all verdicts, with their times."""
    found = []
    for count in range(int(seconds / BEAT_S) + 1):
        now = start + count * BEAT_S
        verdicts = [*detector.beat("node", vitals, now), *detector.verdicts(now)]
        found += [f"{verdict.what} after {verdict.silent_s:.1f} s: {verdict.why}" for verdict in verdicts]
    return found


def look(detector: Detector, start: float, seconds: float) -> list[str]:
    """What is found while another node goes on beating."""
    found = []
    for count in range(int(seconds / BEAT_S) + 1):
        detector.beat("other", (), start + count * BEAT_S)
        verdicts = detector.verdicts(start + count * BEAT_S)
        found += [f"{verdict.what} after {verdict.silent_s:.1f} s: {verdict.why}" for verdict in verdicts]
    return found


def test_an_ended_process_is_told_at_once_and_once() -> None:
    detector = Detector(detection_s=2.0)
    assert watch(detector, 0.0, 3.0, vital()) == []
    assert watch(detector, 3.5, 3.0, vital(alive=False)) == ["rank after 0.0 s: the process has ended"]


def test_an_end_is_told_even_if_the_process_was_never_seen_alive() -> None:
    # A restarted controller waits for a word about every rank on record.
    detector = Detector(detection_s=2.0)
    assert watch(detector, 0.0, 3.0, vital(alive=False, activity="ended")) == [
        "rank after 0.0 s: the process has ended"
    ]


def test_a_stopped_process_is_dead_after_the_detection_time() -> None:
    detector = Detector(detection_s=2.0)
    watch(detector, 0.0, 3.0, vital())
    assert watch(detector, 3.5, 2.0, vital(stopped=True)) == []
    assert watch(detector, 6.0, 0.5, vital(stopped=True)) == ["rank after 2.5 s: the process is stopped"]


def test_a_process_that_goes_on_in_time_is_alive() -> None:
    detector = Detector(detection_s=2.0)
    for start in (0.0, 4.0, 8.0):
        assert watch(detector, start, 1.5, vital(stopped=True)) == []
        assert watch(detector, start + 2.0, 1.5, vital()) == []


def test_a_silent_keeper_is_a_dead_node() -> None:
    detector = Detector(detection_s=2.0)
    watch(detector, 0.0, 3.0, vital())
    assert look(detector, 3.5, 1.5) == []
    assert look(detector, 5.5, 1.0) == ["node after 2.5 s: its keeper has fallen silent"]
    assert look(detector, 7.0, 9.0) == []


def test_an_expected_node_that_is_never_heard_is_dead() -> None:
    detector = Detector(detection_s=2.0)
    detector.expect("node", 0.0)
    assert look(detector, 0.0, 4.0) == ["node after 2.5 s: its keeper has fallen silent"]


def test_expecting_a_node_that_is_heard_changes_nothing() -> None:
    detector = Detector(detection_s=2.0)
    watch(detector, 0.0, 3.0, vital())
    detector.expect("node", 1.0)
    assert detector.nodes == {"node": 3.0}


def test_a_closed_node_is_told_with_its_silence() -> None:
    detector = Detector(detection_s=2.0)
    watch(detector, 0.0, 3.0, vital())
    verdict = detector.node_ended("node", 3.2)
    assert (verdict.what, round(verdict.silent_s, 3)) == ("node", 0.2)
    assert look(detector, 3.5, 9.0) == []


def test_only_a_computing_rank_past_its_first_iteration_can_hang() -> None:
    def after_a_while(shown: Vital) -> list[str]:
        return watch(Detector(detection_s=2.0), 0.0, 61.0, shown)

    assert after_a_while(vital()) == ["rank after 60.5 s: no progress for 60 s while computing"]
    assert after_a_while(vital(work=1)) == []
    for activity in ("starting", "waiting", "paused", "ended"):
        assert after_a_while(vital(activity=activity)) == []  # type: ignore[arg-type]


def test_a_slow_machine_gets_ten_times_its_longest_iteration() -> None:
    detector = Detector(detection_s=2.0)
    assert watch(detector, 0.0, 119.0, vital(longest_s=12.0)) == []
    assert watch(detector, 119.5, 1.0, vital(longest_s=12.0)) == [
        "rank after 120.5 s: no progress for 120 s while computing"
    ]


def test_every_movement_begins_the_count_anew() -> None:
    detector = Detector(detection_s=2.0)
    for round_ in range(4):
        assert watch(detector, round_ * 50.0, 49.5, vital(work=5 + round_)) == []


def test_leaving_a_pause_begins_the_count_anew() -> None:
    detector = Detector(detection_s=2.0)
    watch(detector, 0.0, 100.0, vital(activity="paused"))
    assert watch(detector, 100.5, 59.0, vital()) == []


def test_a_controller_that_slept_blames_nobody() -> None:
    detector = Detector(detection_s=2.0)
    watch(detector, 0.0, 3.0, vital(stopped=True), vital())
    slept_until = 500.0
    assert detector.verdicts(slept_until) == ()
    assert watch(detector, slept_until, 3.0, vital()) == []


def test_many_small_gaps_in_the_controllers_own_time_count_against_nobody() -> None:
    detector = Detector(detection_s=2.0)
    detector.beat("a", (), 0.0)
    detector.beat("b", (), 0.0)
    for turn in range(1, 9):  # looks every 0.9 s, and takes in b's beats only
        detector.beat("b", (), turn * 0.9)
        assert detector.verdicts(turn * 0.9) == ()


def test_when_all_are_silent_the_controller_suspects_itself_for_a_while() -> None:
    detector = Detector(detection_s=2.0)
    for node in ("a", "b"):
        detector.beat(node, (), 0.0)
    looks = [look / 10 for look in range(1, 80)]
    silent = [look for look in looks if detector.verdicts(look)]
    assert silent and 6.0 < silent[0] < 6.3
