"""What a run looks like from outside, as plain values: for `resilient status`, and for whoever breaks things."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from .chronicle import Recovery
from .control import Control
from .detector import Detector
from .plan import Plan
from .standing import Member

RECENT_RECOVERIES = 5


def view(control: Control, detector: Detector) -> dict[str, Any]:
    """Generation, ranks, other processes, nodes and recoveries. Nothing is changed."""
    current, alive = control.current, {member.number: member for member in control.membership.alive()}
    seated, speeds = current.ranks if current else {}, control.speeds.relative()
    chronicle = control.chronicle
    return {
        "generation": current.generation if current else 0,
        "formed": control.formed.generation if control.formed else 0,
        "ranks": [
            {
                "rank": rank,
                **_process(alive[number], detector, "connecting", ended=control.ended),
                "speed": speeds.get(number),
                **_in_pipeline(current, rank, alive[number]),
            }
            for number, rank in seated.items()  # in the order of ranks
            if number in alive
        ],
        "others": [
            _process(member, detector, "ready", ended=control.ended)
            for number, member in alive.items()
            if number not in seated
        ],
        "nodes": dict(sorted(control.membership.nodes.items())),
        "leaving": control.leaving.view(),
        "recoveries": [as_values(recovery) for recovery in chronicle.recoveries[-RECENT_RECOVERIES:]],
        "recovering": as_values(chronicle.open) if chronicle.open else None,
    }


def processes(control: Control) -> dict[str, Any]:
    """Members with their nodes by rank, and those without a seat."""
    current = control.current
    members = current.members if current else ()
    alive = {member.number: member.node for member in control.membership.alive()}
    return {
        "generation": current.generation if current else 0,
        "formed": control.formed.generation if control.formed else 0,
        "ranks": [(number, alive[number]) for number in members if number in alive],
        "others": sorted(set(alive) - set(members)),
        "stages": [stage.ranks for stage in current.stages] if current else [],
    }


def step_of(look: Mapping[str, Any]) -> str:
    """Where the run is, and of how many steps as far as that is known."""
    return f"step {look['step']}" if look["steps"] is None else f"step {look['step']} of {look['steps']}"


def _in_pipeline(current: Plan | None, rank: int, member: Member) -> dict[str, Any]:
    """The layers that it holds, the first and the one after the last, and the share of a step for which it waits."""
    stage = None if current is None else current.stage_of(rank)
    if stage is None:
        return {}
    idle = member.report.idle if member.report is not None else 0.0
    return {"layers": [stage.first, stage.stop], "idle": round(idle, 3)}


def as_values(recovery: Recovery) -> dict[str, Any]:
    return {**asdict(recovery), "total_s": recovery.total_s}


def _process(member: Member, detector: Detector, before_training: str, *, ended: bool) -> dict[str, Any]:
    state = "ended" if ended else _state(member, detector, before_training)
    return {"member": member.number, "node": member.node, "state": state}


def _state(member: Member, detector: Detector, before_training: str) -> str:
    """As its node's keeper saw it last."""
    seen = detector.ranks.get(member.number)
    if seen is not None and seen.vital.stopped:
        return "stopped"
    if member.ready is None:
        return "starting"
    if member.report is None or not member.report.formed:
        return before_training
    return seen.vital.activity if seen is not None else "unknown"
