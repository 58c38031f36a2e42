"""What a run has told so far, and what of it its driver, commands and tests are given."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from actors import launch
from actors.remark import Remark
from actors.saving import SaveNews

from .checkpoints import Saved
from .core.control import Control
from .core.detector import Detector
from .core.instructions import End
from .core.story import Happening
from .core.view import as_values, processes, view
from .job import Job
from .records import Known, Records, ReturnValue, StepValues, mean_loss

RECENT_MESSAGES = 10
MOST_MESSAGES = 200

log = logging.getLogger("resilient.controller")


@dataclass(slots=True, kw_only=True)
class Told:
    job: Job
    control: Control
    curve: Callable[[int, float], object] = lambda step, loss: None
    """Is told the mean loss of each step."""
    keep: Callable[[list[dict[str, float]]], object] = lambda rows: None
    """Is given the rows of this attempt."""
    records: Records = field(default_factory=Records)
    saved: Saved = field(default_factory=Saved)
    snapshots: dict[str, Any] = field(default_factory=dict)
    """What rank 0 has told last of its snapshots."""
    values: dict[int, bytes] = field(default_factory=dict)
    """What the user's function returned, by member."""
    messages: list[str] = field(default_factory=list)
    not_on_record: int = 0
    """What could not be put on record for the controller that comes after this one."""
    began_at: float = field(default_factory=time.monotonic)
    _steps: int | None = None
    """As ranks have said last."""
    _protected: tuple[int, float] = (-1, 0.0)
    """Step of the newest protected snapshot, and when that came to be known."""
    _durable: tuple[int, float] = (-1, 0.0)
    """The same of checkpoints."""

    def say(self, text: str) -> None:
        log.info(text)
        self.messages.append(f"{time.strftime('%H:%M:%S')} {text}")
        del self.messages[:-MOST_MESSAGES]

    def not_recorded(self, error: Exception) -> None:
        """Said the first time."""
        if not self.not_on_record:
            log.warning("something could not be put on record", exc_info=error)
            self.say(f"what a restarted controller would take up could not be put on record: {error!r}")
        self.not_on_record += 1

    def take(self, fact: StepValues | Remark | ReturnValue) -> None:
        match fact:
            case StepValues():
                if self.records.add(fact):
                    self.curve(fact.step, mean_loss(fact))
                self.snapshots.update(fact.snapshots)
                self.control.chronicle.figures.spent.blocked(self.snapshots.get("blocked_s", 0.0))
                self._protected = _since(self._protected, int(self.snapshots.get("protected", -1)))
            case Remark(text=text):
                self.say(text)
            case ReturnValue(member=member, value=value):
                self.values[member] = value

    def heard(self, keeper: str, news: SaveNews) -> list[Happening]:
        """Of a keeper's checkpoints. What is new about them."""
        said = self.saved.heard(keeper, news)
        self._durable = _since(self._durable, int(self.saved.summary()["durable"]))
        for happening in said:
            self.say(happening.reason)
        return said

    @property
    def protected_generation(self) -> int:
        """The newest of which a snapshot is protected everywhere."""
        return int(self.snapshots.get("protected_generation", 0))

    @property
    def steps(self) -> int | None:
        """How many the loop has; None while nobody has said, and for a stream that is read to its end."""
        ready = self.control.membership.first_ready()
        if ready is not None:
            self._steps = ready.steps
        return self._steps

    def news(self, outcome: End | None, fetched: int, known: Known) -> dict[str, Any]:
        """For the driver, who has rows up to step `fetched`, and otherwise what it knows."""
        chronicle, current, formed = self.control.chronicle, self.control.current, self.control.formed
        heard_me = known.controller == os.getpid()
        if not heard_me and known.rewound_in == self.records.last_rewind:
            chronicle.was_committed(known.step - 1)
        back_to = self.records.back_to(known.rewound_in)
        if back_to is not None:
            fetched = min(fetched, back_to - 1)
        rows = self.records.after(fetched, all_of_them=outcome is not None)
        if outcome is None or not self.records.nothing_was_left:  # else they are kept already
            self.keep(rows)
        return {
            "rows": rows,
            "step": self.records.newest + 1,
            "steps": self.steps,
            "generation": current.generation if current else 0,
            "ranks": formed.size if formed else 0,
            "recoveries": [as_values(item) for item in chronicle.ended_after(known.recoveries if heard_me else 0)],
            "back_to": back_to,
            "bubbles": self.control.bubbles.as_values(),
            "snapshots": dict(self.snapshots),
            "checkpoints": self.saved.summary() if self.job.settings.checkpoint else {},
            "known": Known(
                controller=os.getpid(),
                recoveries=chronicle.ended,
                rewound_in=self.records.last_rewind,
                step=self.records.newest + 1,
            ),
            "messages": list(self.messages),
            "waiting": self._waiting(),
            "outcome": None if outcome is None else asdict(outcome),
            "value": self._return_value() if outcome is not None else None,
        }

    def _waiting(self) -> dict[str, Any] | None:
        """For nodes."""
        return {"for_s": self.control.waiting_s, "why": self.control.waiting_for} if self.control.waits else None

    def look(self, outcome: End | None, detector: Detector) -> dict[str, Any]:
        """All that is known, without a say in anything: neither a lease nor a row is taken."""
        settings, chronicle = self.job.settings, self.control.chronicle
        limits, now = settings.limits, time.monotonic()
        return {
            "run": settings.name,
            "attempt": self.job.attempt,
            "step": self.records.newest + 1,
            "steps": self.steps,
            "loss": self.records.newest_loss,
            "step_s": chronicle.usual_s,
            "committed_s_ago": now - (chronicle.committed_at or self.began_at),
            "recovering_s": now - chronicle.open.began_at if chronicle.open else 0.0,
            "waiting_s": self.control.waiting_s,
            "protected_s_ago": now - (self._protected[1] or self.began_at) if settings.snapshot else None,
            "durable_s_ago": now - (self._durable[1] or self.began_at) if settings.checkpoint else None,
            "wanted": {"min": limits.min_workers, "max": limits.max_workers, "spares": limits.spares},
            **view(self.control, detector),
            "snapshots": dict(self.snapshots),
            "checkpoints": self.saved.summary() if settings.checkpoint else {},
            "messages": self.messages[-RECENT_MESSAGES:],
            "not_on_record": self.not_on_record,
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


def warn_on_stderr() -> None:
    """For a process of the runtime's own: what it warns of goes into its log, though the package itself is quiet."""
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    logging.getLogger("resilient").addHandler(handler)


def _since(known: tuple[int, float], step: int) -> tuple[int, float]:
    """Since when it has been this step."""
    return known if known[0] == step else (step, time.monotonic())
