"""How a run ends: its last checkpoint is waited for, the outcome stands, and then nothing of the run is left behind.

What ends it is decided elsewhere, by the core or where an end is found. The controller's own process ends last: until
then it holds the outcome for the driver a while, and after that shows it to those who scrape the run.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from actors import launch
from actors.lease import Lease

from .core.control import Control
from .core.instructions import End
from .core.story import Happening
from .errands import Errands
from .job import Job
from .ledger import Ledger
from .showing import Showing
from .told import Told
from .workers import Workers

LOOK_EVERY_S = 0.05
OUTCOME_KEPT_S = 60.0
FINISH_LIMIT_S = 1800.0
"""How long the end of a run waits for its last checkpoint, on storage that may have stalled."""
END_LIMIT_S = 30.0
"""How long the controller's own end may take to be recorded, or carried out."""
DRIVER_GONE = "the driver has gone"


@dataclass(slots=True, kw_only=True)
class Ending:
    job: Job
    me: Any
    """The controller's own actor, which ends last."""
    lock: threading.Lock
    """Held while a fact is taken in."""
    driver: Lease
    control: Control
    ledger: Ledger
    errands: Errands
    workers: Workers
    showing: Showing
    told: Told
    happened: Callable[[Happening], None]
    """Is told of the end."""
    outcome: End | None = None
    closed: bool = False
    """The driver has the outcome."""
    lingering: bool = False
    """All is over, and those who scrape the run are only to see that it is."""
    _gives_way: bool = False
    _ended_at: float = 0.0
    _finishing: End | None = None
    """What the run ends with, once its last checkpoint is durable."""
    _finishing_since: float = 0.0
    _still_saving: dict[str, int] = field(default_factory=dict)
    """Nodes that have not said that they are done, with the keepers' incarnations that were asked."""

    def end(self, end: End) -> None:
        if end.outcome == "finished" and self.job.settings.checkpoint is not None and self._finishing is None:
            self._finishing, self._finishing_since = end, time.monotonic()
            self._still_saving = dict.fromkeys(self.workers.keepers, 0)
            self._finish_saving()
        else:
            self._conclude(end)

    def give_way(self) -> bool:
        """Whether it lingers, which it does no longer then."""
        self._gives_way = self.lingering
        return self.lingering

    # The last checkpoint

    def not_saving(self, node: str) -> None:
        """Its keeper has saved all that it is to save, or is gone with it."""
        self._still_saving.pop(node, None)

    def look_around(self) -> None:
        if self._finishing is not None and self.outcome is None:
            self._finish_saving()

    def _finish_saving(self) -> None:
        """The final state's checkpoint is waited for; a keeper that was replaced meanwhile is asked again."""
        assert self._finishing is not None
        for node in self._still_saving:
            if node in self.workers.keepers and self._still_saving[node] != self.workers.incarnation(node):
                self._still_saving[node] = self.workers.incarnation(node)
                self.workers.keepers[node].finish_saving.remote()
        late = time.monotonic() - self._finishing_since > FINISH_LIMIT_S
        if late:
            self.told.say(f"the last checkpoint is given up: not written within {FINISH_LIMIT_S:.0f} s")
        if late or not self._still_saving or self.driver.expired():
            if missed := self.told.saved.missed(self.told.records.newest + 1):
                self.told.say(missed)
            self._conclude(self._finishing)

    # The outcome

    def _conclude(self, end: End) -> None:
        if self.outcome is not None:
            return
        self.outcome = end
        self.control.ended = True  # the core does not know of an end that was found here: it decides nothing more
        self._ended_at = time.monotonic()
        self.happened(Happening(kind="run ended", reason=end.reason, more={"outcome": end.outcome}))
        threading.Thread(target=self._clean_up, name="clean-up", daemon=True).start()

    def _clean_up(self) -> None:
        """Leave no process, file or key behind, then end; the outcome waits for the driver a while."""
        superseded = self.outcome is not None and self.outcome.outcome == "superseded"
        keepers_stay = self._keepers_stay()
        if not superseded:
            with self.lock:  # the loop goes on, and hears of deaths
                processes = self.workers.close()
            processes.end(linger=keepers_stay)
        self.showing.conclude(superseded=superseded)
        while not self.closed and time.monotonic() - self._ended_at < OUTCOME_KEPT_S and not self.driver.expired():
            time.sleep(LOOK_EVERY_S)
        if not superseded:
            self._close_records(keep_lineage=keepers_stay)
            self._linger()
        self.showing.end()
        self.errands.run(lambda: launch.end(self.me))

    def _close_records(self, *, keep_lineage: bool) -> None:
        """After whatever is still to be recorded; what is not within the limit is done before this process ends."""
        done = threading.Event()

        def close() -> None:
            try:
                self.ledger.close(keep_lineage=keep_lineage)
            finally:
                done.set()

        self.errands.run(close)
        done.wait(END_LIMIT_S)

    def _linger(self) -> None:
        """Nothing of the run is left but what it shows."""
        while not self._gives_way and self.showing.is_awaited(self._ended_at):
            self.lingering = True
            time.sleep(LOOK_EVERY_S)

    def _keepers_stay(self) -> bool:
        """Whether the run may be submitted again and go on from memory: it has neither finished, nor did its
        driver end it."""
        snapshot, outcome = self.job.settings.snapshot, self.outcome
        if snapshot is None or outcome is None or snapshot.linger_s == 0:
            return False
        return outcome.outcome == "failed" or (outcome.outcome == "stopped" and outcome.reason == DRIVER_GONE)
