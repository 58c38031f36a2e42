"""Who is waited for after a run's end, and for how long."""

from __future__ import annotations

import pytest

from resilient.core.lingering import GAPS, LAST_GAPS, MOST_S, MOST_SCRAPERS, USUAL_GAP_S, Scrapes

END = 1000.0


def scrapes(**times: tuple[float, ...]) -> Scrapes:
    """By who it is. Each is told how things stand at that moment."""
    found = Scrapes()
    for who, when in times.items():
        for now in when:
            found.scraped(who, now, now)
    return found


def test_nobody_is_waited_for_if_nobody_ever_came() -> None:
    assert Scrapes().awaited_until(END) == END


def test_who_comes_every_15_s_is_waited_for_until_it_has_seen_the_end() -> None:
    found = scrapes(a=(965.0, 980.0, 995.0))
    assert found.awaited_until(END) == END + GAPS * 15.0
    found.scraped("a", 1010.0, 1010.0)
    assert found.awaited_until(END) == END


def test_an_answer_from_before_the_end_does_not_count() -> None:
    """All who ask within a second share one."""
    found = scrapes(a=(965.0, 980.0, 995.0))
    found.scraped("a", 1000.5, 999.7)
    assert found.awaited_until(END) > END
    found.scraped("a", 1010.5, 1010.5)
    assert found.awaited_until(END) == END


def test_each_of_two_is_waited_for() -> None:
    found = scrapes(a=(970.0, 985.0), b=(960.0, 990.0))
    found.scraped("b", 1020.0, 1020.0)
    assert found.awaited_until(END) == END + GAPS * 15.0
    found.scraped("a", 1001.0, END)
    assert found.awaited_until(END) == END


@pytest.mark.parametrize(
    ("times", "patience_s"),
    [
        ((999.0,), GAPS * USUAL_GAP_S),
        ((900.0, 990.0), MOST_S),
        ((0.0, 60.0, *(945.0 + 10.0 * number for number in range(LAST_GAPS + 1))), GAPS * 10.0),
        ((970.0, 985.0, 986.0), GAPS * 15.0),
    ],
    ids=["came once", "comes seldom", "came seldom long ago", "came early once"],
)
def test_how_long(times: tuple[float, ...], patience_s: float) -> None:
    assert scrapes(a=times).awaited_until(END) == END + patience_s


@pytest.mark.parametrize("times", [(700.0,), (700.0, 715.0, 730.0), (100.0, 500.0)])
def test_who_has_stopped_is_not_waited_for(times: tuple[float, ...]) -> None:
    assert scrapes(a=times).awaited_until(END) == END


def test_only_so_many_are_remembered_those_who_came_last() -> None:
    found = scrapes(first=(990.0,))
    for number in range(MOST_SCRAPERS):
        found.scraped(str(number), 995.0, 1001.0)
    assert found.awaited_until(END) == END
