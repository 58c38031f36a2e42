"""What is going on in the running cluster, asked of the runs' controllers. It has no effect on them."""

from __future__ import annotations

import logging
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError

from actors import launch

from .cli_output import Answer
from .core.view import step_of

ANSWER_LIMIT_S = 10.0

RunView = dict[str, Any]


def attach() -> None:
    """Join the cluster that runs on this machine, or that RAY_ADDRESS names. Raises ConnectionError without one."""
    if ray.is_initialized():
        return
    try:
        ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        raise ConnectionError(
            "no Ray cluster can be joined from here: run this on one of its machines, or set RAY_ADDRESS"
        ) from error


def runs(run: str | None = None) -> list[RunView]:
    """All that are going on, or this one, by name and attempt. A controller that does not answer in time has
    only `run`, `attempt` and `error`."""
    found = [_asked(*key) for key in controllers(launch.names(f"{run}/" if run is not None else ""))]
    return [view for view in found if not view.get("lingers")]


def controllers(names: list[str]) -> list[tuple[str, int]]:
    """Run and attempt of those among these actors, in order."""
    parts = [name.split("/") for name in names]
    return sorted((part[0], int(part[1])) for part in parts if len(part) == 3 and part[2] == "controller")


def _asked(run: str, attempt: int) -> RunView:
    handle = launch.find(f"{run}/{attempt}/controller")
    error = "its controller has just ended"
    if handle is not None:
        try:
            found: RunView = ray.get(handle.look.remote(), timeout=ANSWER_LIMIT_S)
            return found
        except (RayActorError, GetTimeoutError):
            error = f"its controller has not answered within {ANSWER_LIMIT_S:.0f} s: it may be restarting"
    return {"run": run, "attempt": attempt, "error": error}


def shown(run: str) -> dict[str, Any] | None:
    """All that the live page of this run shows; None while its controller does not answer, or if there is none."""
    found = controllers(launch.names(f"{run}/"))
    handle = launch.find(f"{run}/{found[-1][1]}/controller") if found else None
    if handle is None:
        return None
    try:
        answer: dict[str, Any] = ray.get(handle.shown.remote(), timeout=ANSWER_LIMIT_S)
    except (RayActorError, GetTimeoutError):
        return None
    return answer


def describe(answer: Answer, found: list[RunView], run: str | None = None) -> None:
    """For people and for programs. Not good if nothing is running."""
    answer.document["runs"] = found
    if not found:
        answer.good = False
        answer.say("nothing is running" if run is None else f"no run {run!r} is going on")
    for number, view in enumerate(found):
        if number:
            answer.say("")
        if "error" in view:
            answer.good = False
            answer.say(f"{view['run']}, attempt {view['attempt']}: {view['error']}")
        else:
            _describe(answer, view)


def _describe(answer: Answer, view: RunView) -> None:
    answer.say(
        f"{view['run']}, attempt {view['attempt']}: {step_of(view)}, generation {view['generation']}, "
        f"{len(view['ranks'])} ranks on {len({seat['node'] for seat in view['ranks']})} of {len(view['nodes'])} nodes"
    )
    if view["outcome"] is not None:
        answer.say(f"ended: {view['outcome']['outcome']}: {view['outcome']['reason']}")
    if view["recovering"] is not None:
        answer.say(f"recovering: {view['recovering']['kind']} {view['recovering']['reason']}".rstrip())
    if view["observe"]["url"] is not None:
        answer.say(f"live page: {view['observe']['url']}")
    answer.say(f"snapshots: {_snapshots(view['snapshots'])}")
    answer.say(f"checkpoints: {_checkpoints(view['checkpoints'])}")
    for node, leaving in view["leaving"].items():
        answer.say(f"node {node[:8]}: {in_words(leaving)}")
    if view["ranks"] or view["others"]:
        answer.say("")
        _describe_processes(answer, view)
    if view["recoveries"]:
        answer.say("")
        recovered = [
            (item["step"], item["kind"], item["ranks"], _source(item), f"{item['total_s']:.2f}", item["reason"])
            for item in view["recoveries"]
        ]
        columns = ("step", "recovery", "ranks", "from", "seconds", "why")
        answer.table(columns, recovered, right=("step", "ranks", "seconds"))
    if view["messages"]:
        answer.say("")
        for message in view["messages"]:
            answer.say(message)


def _describe_processes(answer: Answer, view: RunView) -> None:
    in_stages = any("layers" in seat for seat in view["ranks"])
    more = ("layers", "idle") if in_stages else ("speed",)
    rows = [
        (process.get("rank", "-"), process["member"], process["node"][:8], process["state"], *_more(process, in_stages))
        for process in (*view["ranks"], *view["others"])
    ]
    answer.table(("rank", "member", "node", "state", *more), rows, right=("rank", "member", *more))


def _more(process: dict[str, Any], in_stages: bool) -> tuple[str, ...]:
    if not in_stages:
        return (_speed(process.get("speed")),)
    if "layers" not in process:
        return ("-", "-")
    first, stop = process["layers"]
    return (f"{first}" if stop == first + 1 else f"{first}-{stop - 1}", f"{process['idle']:.0%}")


def _speed(relative: float | None) -> str:
    return "-" if relative is None else f"{relative:.2f}"


def in_words(leaving: dict[str, Any]) -> str:
    """Of a node that was asked to leave."""
    if leaving["state"] == "drained":
        return "drained: nothing of the run is on it"
    waits = leaving["stuck"] or f"waits for {leaving['waits_for']}"
    return f"is to leave ({leaving['why']}): {waits}"


def _source(recovery: dict[str, Any]) -> str:
    back = recovery["restored_step"]
    return recovery["source"] if back < 0 else f"{recovery['source']}, step {back}"


def _snapshots(told: dict[str, Any]) -> str:
    if not told:
        return "none yet"
    protected = int(told.get("protected", -1))
    return f"step {protected} is protected everywhere" if protected >= 0 else "none is protected everywhere yet"


def _checkpoints(told: dict[str, Any]) -> str:
    if not told:
        return "not asked for"
    durable = f"step {told['durable']} is durable" if told["durable"] >= 0 else "none is durable yet"
    failures = f", {told['failures']} failed, the last: {told['last_failure']}" if told["failures"] else ""
    return f"{durable}, {told['committed']} were written{failures}"
