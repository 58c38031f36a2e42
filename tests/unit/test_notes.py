"""What is put on record for another controller: the run goes on without it."""

from __future__ import annotations

import queue
from types import SimpleNamespace
from typing import Any

from resilient.core.control import Control
from resilient.core.limits import Limits
from resilient.errands import Done, Errands
from resilient.notes import Notes
from resilient.told import Told


def test_what_can_t_be_put_on_record_is_said_once_and_counted_and_the_run_goes_on() -> None:
    control = Control(limits=Limits(min_workers=1, max_workers=2))
    told = Told(job=Any, control=control)  # type: ignore[arg-type]
    done: queue.Queue[Done] = queue.Queue()

    def refused(record: object) -> None:
        raise ValueError("the cluster would not take it")

    ledger: Any = SimpleNamespace(count=refused)
    notes = Notes(ledger, Errands(done.put), told)
    for _ in range(3):  # it is tried again
        notes.count(control.chronicle, control.newest)
        done.get(timeout=10.0).finish()
    assert told.not_on_record == 3
    (message,) = told.messages
    assert message.endswith("ValueError('the cluster would not take it')")
