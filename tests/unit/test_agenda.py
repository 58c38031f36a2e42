"""What a keeper protects next, when it gives up, and which parity blocks it keeps."""

from __future__ import annotations

from actors.agenda import (
    MOST_KEPT,
    MOST_RINGS,
    REST_S,
    TURN_S,
    Agenda,
    BlockState,
    hopeless,
    in_time,
    overtaken,
    pause_s,
    surplus,
)
from snapshot.core.inventory import SnapshotKey
from snapshot.core.lifecycle import Ordinal
from tests.vaults import key_of, ring_of


def block(step: int, missing: str = "", class_index: int = 0, generation: int = 1) -> BlockState:
    return BlockState(key=key_of(step, generation=generation), class_index=class_index, missing=frozenset(missing))


def steps(blocks: list[BlockState]) -> list[int]:
    return sorted(found.key.step for found in blocks)


def agenda_that_saw(*found: SnapshotKey, now: float = 0.0) -> Agenda:
    agenda = Agenda()
    agenda.see(found, now)
    return agenda


def test_the_newest_that_is_complete_is_protected_and_no_older_one() -> None:
    agenda = agenda_that_saw(key_of(3), key_of(5), key_of(4))
    assert agenda.next(0.0) == key_of(5)
    assert agenda.succeeded(key_of(5), 2.0) == 2.0
    assert agenda.next(0.0) is None
    agenda.see([key_of(3), key_of(5), key_of(6)], 3.0)
    assert agenda.next(0.0) == key_of(6)


def test_a_later_generation_goes_first_although_it_has_rolled_back() -> None:
    agenda = agenda_that_saw(key_of(9))
    agenda.succeeded(key_of(9), 0.0)
    agenda.see([key_of(9), key_of(7, generation=2)], 1.0)
    assert agenda.next(0.0) == key_of(7, generation=2)
    assert in_time(key_of(7, generation=2)) > in_time(key_of(9))


def test_what_was_given_up_rests_or_waits_for_a_new_address() -> None:
    agenda = agenda_that_saw(key_of(3))
    agenda.failed(key_of(3), "peer lost", 0.0)
    assert agenda.next(0.0) is None and agenda.failures == {"peer lost": 1}
    agenda.see([key_of(3)], 1.0)
    assert agenda.next(REST_S - 0.1) is None
    assert agenda.next(REST_S) == key_of(3)
    agenda.revive()
    assert agenda.next(0.0) == key_of(3)
    agenda.see([key_of(3), key_of(4)], 2.0)
    assert agenda.next(0.0) == key_of(4)


def test_a_newer_one_gives_what_runs_its_turn() -> None:
    ring = ring_of("abc", 1)
    agenda = agenda_that_saw(key_of(3), now=100.0)
    assert agenda.why_stop(key_of(3), ring, "a", ring, 100.0 + 100 * TURN_S) is None
    agenda.see([key_of(3), key_of(4)], 200.0)
    assert agenda.why_stop(key_of(3), ring, "a", ring, 200.0 + TURN_S) is None
    assert agenda.why_stop(key_of(3), ring, "a", ring, 200.1 + TURN_S) == "overtaken"


def test_a_peer_that_the_next_generation_lacks_is_not_waited_for() -> None:
    ring = ring_of("abcd", 1)
    agenda = agenda_that_saw(key_of(3))
    assert agenda.why_stop(key_of(3), ring, "a", ring_of("abcde", 1, generation=2), 0.0) is None
    assert agenda.why_stop(key_of(3), ring, "a", ring_of("abd", 1, generation=2), 0.0) == "peer left"
    assert agenda.why_stop(key_of(3), ring, "a", None, 0.0) is None


def test_pauses_grow_and_are_bounded() -> None:
    pauses = [pause_s(tries) for tries in range(1, 12)]
    assert pauses == sorted(pauses) and pauses[0] < 0.1 and pauses[-1] == 1.0


def test_who_sends_a_newer_one_will_not_complete_an_older_one() -> None:
    blocks = [block(3, "ab"), block(3, "b", 1), block(4, "a"), block(2), block(5, "a"), block(9, "a")]
    assert overtaken(blocks, "a", key_of(5)) == [block(3, "ab"), block(4, "a")]
    assert overtaken(blocks, "a", key_of(1, generation=2)) == [
        block(3, "ab"), block(4, "a"), block(5, "a"), block(9, "a"),
    ]  # fmt: skip


def test_older_than_what_is_protected_everywhere_goes() -> None:
    blocks = [block(step, class_index=number) for step in (3, 4, 5) for number in (0, 1)]
    assert surplus(blocks, None) == []
    assert steps(surplus(blocks, Ordinal(0, 4))) == [3, 3]
    assert steps(surplus([*blocks, block(2, generation=2)], Ordinal(0, 5))) == [2, 3, 3, 4, 4]


def test_of_each_class_a_few_are_kept() -> None:
    blocks = [block(step) for step in (3, 4, 5)]
    assert MOST_KEPT == 3 and surplus(blocks, None) == []
    arriving = block(6, "ab")
    assert steps(surplus([*blocks, arriving], None)) == [3], "the newest has room, although it is not complete"
    assert steps(surplus([*blocks, arriving], Ordinal(0, 3))) == [4], "protected everywhere is worth more than new"
    assert steps(surplus([block(3), block(4), block(5, "a"), arriving], None)) == [5], "so is complete"
    assert surplus([*blocks, block(6, generation=2)], None) == [], "another ring has classes of its own"
    assert steps(surplus([block(1), block(2), block(4, "a"), block(3, "a")], None)) == [3], "older gives way to newer"


def test_a_block_is_not_begun_when_somebody_has_gone_on() -> None:
    latest = {"a": key_of(5), "b": key_of(7)}
    assert hopeless(latest, "ab", key_of(6)) == "b"
    assert hopeless(latest, "ac", key_of(6)) is None
    assert hopeless(latest, "abc", key_of(2, generation=2)) is None


def test_of_old_rings_nothing_is_kept_but_what_is_protected_everywhere() -> None:
    blocks = [block(3, generation=generation) for generation in range(MOST_RINGS + 2)]
    assert surplus(blocks, None) == blocks[:2]
    assert surplus(blocks, Ordinal(0, 3)) == []
