"""Until when a run that has ended goes on being served: until those who scrape it have seen that it has. Pure.

Whoever scrapes does so at a pace of its own, and the end falls between two scrapes. Without another one it looks as if
the controller had died. Whoever has stopped scraping, or never comes back, is not waited for.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import pairwise

MOST_S = 120.0
GAPS = 2.5
"""So many times its usual gap somebody may be late: one scrape may fail."""
LAST_GAPS = 5
USUAL_GAP_S = 15.0
"""Of somebody who has scraped only once."""
MOST_SCRAPERS = 16


@dataclass(slots=True, kw_only=True)
class _Scraper:
    times: deque[float] = field(default_factory=lambda: deque(maxlen=LAST_GAPS + 1))
    as_of: float = float("-inf")
    """When what it got last was made."""

    @property
    def patience_s(self) -> float:
        gaps = [later - earlier for earlier, later in pairwise(self.times)]
        return min(MOST_S, GAPS * max(gaps, default=USUAL_GAP_S))


@dataclass(slots=True)
class Scrapes:
    """All times are seconds of one clock that never goes backwards."""

    _by: dict[str, _Scraper] = field(default_factory=dict)

    def scraped(self, who: str, now: float, as_of: float) -> None:
        """Somebody has been told now how things stood at `as_of`."""
        scraper = self._by.pop(who, None) or _Scraper()
        scraper.times.append(now)
        scraper.as_of = as_of
        self._by[who] = scraper  # the last of them now
        if len(self._by) > MOST_SCRAPERS:
            del self._by[next(iter(self._by))]

    def awaited_until(self, ended_at: float) -> float:
        """Until when somebody is waited for; `ended_at` if nobody is."""
        return max((_until(scraper, ended_at) for scraper in self._by.values()), default=ended_at)


def _until(scraper: _Scraper, ended_at: float) -> float:
    has_stopped = ended_at - scraper.times[-1] > scraper.patience_s
    return ended_at if scraper.as_of >= ended_at or has_stopped else ended_at + scraper.patience_s
