"""What a run has told so far, and what of it its driver, commands and tests are given."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from actors import launch
from actors.remark import Remark

from .checkpoints import Saved
from .core.control import Control
from .core.detector import Detector
from .core.instructions import End
from .core.view import as_values, processes, view
from .job import Job
from .records import Known, Records, ReturnValue, StepValues

RECENT_MESSAGES = 10
MOST_MESSAGES = 200

log = logging.getLogger("resilient.controller")


@dataclass(slots=True, kw_only=True)
class Told:
    job: Job
    control: Control
    records: Records = field(default_factory=Records)
    saved: Saved = field(default_factory=Saved)
    snapshots: dict[str, Any] = field(default_factory=dict)
    """What rank 0 has told last of its snapshots."""
    values: dict[int, bytes] = field(default_factory=dict)
    """What the user's function returned, by member."""
    messages: list[str] = field(default_factory=list)

    def say(self, text: str) -> None:
        log.info(text)
        self.messages.append(f"{time.strftime('%H:%M:%S')} {text}")
        del self.messages[:-MOST_MESSAGES]

    def take(self, fact: StepValues | Remark | ReturnValue) -> None:
        match fact:
            case StepValues():
                self.records.add(fact)
                self.snapshots.update(fact.snapshots)
            case Remark(text=text):
                self.say(text)
            case ReturnValue(member=member, value=value):
                self.values[member] = value

    @property
    def protected_generation(self) -> int:
        """The newest of which a snapshot is protected everywhere."""
        return int(self.snapshots.get("protected_generation", 0))

    def news(self, outcome: End | None, fetched: int, known: Known) -> dict[str, Any]:
        """For the driver, who has rows up to step `fetched`, and otherwise what it knows."""
        chronicle, current, formed = self.control.chronicle, self.control.current, self.control.formed
        heard_me = known.controller == os.getpid()
        if not heard_me and known.rewound_in == self.records.last_rewind:
            chronicle.was_committed(known.step - 1)
        back_to = self.records.back_to(known.rewound_in)
        if back_to is not None:
            fetched = min(fetched, back_to - 1)
        return {
            "rows": self.records.after(fetched, all_of_them=outcome is not None),
            "step": self.records.newest + 1,
            "generation": current.generation if current else 0,
            "ranks": formed.size if formed else 0,
            "recoveries": [as_values(item) for item in chronicle.recoveries[known.recoveries if heard_me else 0 :]],
            "back_to": back_to,
            "snapshots": dict(self.snapshots),
            "checkpoints": self.saved.summary() if self.job.settings.checkpoint else {},
            "known": Known(
                controller=os.getpid(),
                recoveries=len(chronicle.recoveries),
                rewound_in=self.records.last_rewind,
                step=self.records.newest + 1,
            ),
            "messages": list(self.messages),
            "outcome": None if outcome is None else asdict(outcome),
            "value": self._return_value() if outcome is not None else None,
        }

    def look(self, outcome: End | None, detector: Detector) -> dict[str, Any]:
        """All that is known, without a say in anything: neither a lease nor a row is taken."""
        settings = self.job.settings
        return {
            "run": settings.name,
            "attempt": self.job.attempt,
            "step": self.records.newest + 1,
            **view(self.control, detector),
            "snapshots": dict(self.snapshots),
            "checkpoints": self.saved.summary() if settings.checkpoint else {},
            "messages": self.messages[-RECENT_MESSAGES:],
            "outcome": None if outcome is None else asdict(outcome),
            "memory": settings.snapshot.directory if settings.snapshot else launch.MEMORY,
        }

    def processes(self) -> dict[str, Any]:
        """Live processes by rank, for tests and chaos: member and node of each."""
        return {"step": self.records.newest + 1, **processes(self.control)}

    def _return_value(self) -> bytes | None:
        current = self.control.current
        members = current.members if current else ()
        return next((self.values[member] for member in members if member in self.values), None)
