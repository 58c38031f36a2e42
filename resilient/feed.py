"""What a run shows of itself: how things stand now, and a bounded history of losses, recoveries and happenings."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .core.chronicle import PLANNED_KINDS
from .core.losses import Losses
from .exposition import RunCollector
from .metrics import Seen

MOST_HAPPENINGS = 500
MOST_RECOVERIES = 200

Record = Mapping[str, Any]
"""Of something that happened, as in events.jsonl."""


@dataclass(frozen=True, slots=True)
class Mark:
    """How far somebody has been told."""

    edition: int
    step: int
    happenings: int
    recoveries: int


class Feed:
    """Written by the controller, read by whatever serves it; any thread may."""

    def __init__(self, seen: Callable[[], Seen]) -> None:
        self._seen = seen
        self._collector = RunCollector(seen)
        self._lock = threading.Lock()
        """Held for moments: whoever takes it asks nobody for anything."""
        self._losses = Losses()
        self._happenings: deque[Record] = deque(maxlen=MOST_HAPPENINGS)
        self._recoveries: deque[Record] = deque(maxlen=MOST_RECOVERIES)
        self._told = [0, 0]
        """Happenings and recoveries so far."""

    # Written

    def loss(self, step: int, loss: float) -> None:
        with self._lock:
            self._losses.add(step, loss)

    def take_up(self, losses: Mapping[str, Any]) -> None:
        """What a feed before this one had in its history, as JSON has it."""
        newest = losses["newest"]
        with self._lock:
            self._losses.take_up(
                losses["every"],
                ((step, loss) for step, loss in losses["points"]),
                None if newest is None else (newest[0], newest[1]),
            )

    def back_to(self, step: int) -> None:
        with self._lock:
            self._losses.back_to(step)

    def happened(self, record: Record) -> None:
        with self._lock:
            self._happenings.append(record)
            self._told[0] += 1
            if record["kind"] == "recovery ended":
                self._recoveries.append(record)
                self._told[1] += 1

    # Read

    def metrics(self) -> bytes:
        return self._collector.text()

    def now(self) -> dict[str, Any]:
        seen = self._seen()
        spent, look = seen.figures.spent, seen.look
        state, detail = state_of(look)
        shown: dict[str, Any] = finite(
            {
                **look,
                "state": state,
                "detail": detail,
                "spent": {**spent.seconds, "pending": spent.pending_s},
                "failures": dict(seen.figures.failures),
                "steps_lost": seen.figures.lost_steps,
                "unix": time.time(),
            }
        )
        return shown

    def history(self, mark: Mark | None) -> tuple[dict[str, Any], Mark]:
        with self._lock:
            anew = mark is None or mark.edition != self._losses.edition
            since = -1 if anew or mark is None else mark.step
            points = self._losses.after(since)
            told = (mark.happenings, mark.recoveries) if mark is not None else (0, 0)
            happenings = _newest(self._happenings, self._told[0] - told[0])
            recoveries = _newest(self._recoveries, self._told[1] - told[1])
            found = {
                "anew": mark is None,
                "losses": {"anew": anew, "every": self._losses.every, "points": points, "newest": self._losses.newest},
                "happenings": happenings,
                "recoveries": recoveries,
            }
            return found, Mark(self._losses.edition, max((step for step, _ in points), default=since), *self._told)


def _newest(records: deque[Record], count: int) -> list[Record]:
    return [records[place] for place in range(max(0, len(records) - count), len(records))]


def state_of(look: Mapping[str, Any]) -> tuple[str, str]:
    """What the run is doing in a word or two, and what more there is to say of it."""
    if look["outcome"] is not None:
        return look["outcome"]["outcome"], look["outcome"]["reason"]
    if look["waiting_s"] > 0:
        return "waiting for nodes", f"{len(look['ranks'])} ranks are there, {look['wanted']['min']} are the least"
    recovering = look["recovering"]
    if recovering is not None and recovering["kind"] not in PLANNED_KINDS:
        return f"recovering: {_phase(look, recovering)}", recovering["reason"] or recovering["kind"]
    if look["step"] == 0:
        return "starting", ""
    if recovering is not None:
        return "training", f"a change is under way: {recovering['reason'] or recovering['kind']}"
    return "training", ""


def _phase(look: Mapping[str, Any], recovering: Mapping[str, Any]) -> str:
    if recovering["generation"] == 0 or recovering["generation"] != look["generation"]:
        return "deciding"
    return "forming" if look["formed"] < recovering["generation"] else "computing again"


def finite(value: Any) -> Any:
    """The same as JSON can say it: what is no number becomes None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [finite(item) for item in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if value is None or isinstance(value, str | int):
        return value
    return str(value)
