"""What the demo found out: whether the bits are the same, and whether all that was done was recovered from."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

PLANNED = ("kill", "node loss", "join")
PHASES = ("detect_s", "decide_s", "form_s", "redo_s", "total_s")

Event = Mapping[str, Any]
Recovery = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    identical: bool
    """The same bits of state on the cluster as in one process."""
    survived_all: bool
    """Every planned event happened, and there is a recovery that answers it."""
    steps: int
    digest: str
    digest_undisturbed: str
    parameters: int
    events: list[dict[str, Any]]
    recoveries: list[dict[str, Any]]
    seed: int
    seconds: float
    versions: dict[str, str]
    bubbles: list[dict[str, Any]]
    metrics: list[dict[str, float]]
    metrics_undisturbed: list[dict[str, float]]

    @property
    def passed(self) -> bool:
        return self.identical and self.survived_all

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def answer(event: Event, recoveries: Sequence[Recovery]) -> Recovery | None:
    """The recovery that this event led to."""
    for recovery in recoveries:
        lost = {item["node"] for item in recovery["lost"]}
        joined = recovery["kind"] == "joined" and event["node"][:8] in recovery["reason"]
        if {
            "kill": recovery["kind"] in ("rank lost", "node lost") and event["node"] in lost,
            "node loss": recovery["kind"] == "node lost" and event["node"] in lost,
            "join": joined,
        }[event["kind"]]:
            return recovery
    return None


def unanswered(events: Sequence[Event], recoveries: Sequence[Recovery]) -> list[Event]:
    return [event for event in events if answer(event, recoveries) is None]


def survived_all(events: Sequence[Event], recoveries: Sequence[Recovery]) -> bool:
    happened = tuple(event["kind"] for event in events)
    return happened == PLANNED and not unanswered(events, recoveries)


def versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("resilient-runtime", "torch", "ray")}
    return {"python": platform.python_version(), **packages}
