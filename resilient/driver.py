"""The driver's side of a run on Ray: start the controller, keep its lease, collect what comes."""

from __future__ import annotations

import os
import secrets
import sys
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors import launch

from .checkpoints import first_attempt
from .controller import Controller
from .core.listening import address_of
from .errors import ResilientError, RunLost, RunStopped, TrainingFailed
from .function_store import drop_stored, store_function
from .job import Job, Settings
from .records import Known
from .result import Result, loaded
from .spilled import Spilled

POLL_EVERY_S = 0.1
CONTROLLER_LIMIT_S = 60.0
"""How long the driver waits for a controller that no longer answers."""
CONTROLLER_START_LIMIT_S = 300.0
"""How long it waits for the first answer: a busy cluster starts processes slowly."""
MAKE_ROOM_LIMIT_S = 10.0
"""How long it waits for a controller whose run has ended to end."""

Progress = Callable[[dict[str, Any]], None]


def run_on_ray(settings: Settings, pack: Callable[[], bytes], progress: Progress) -> Result:
    """Start or join Ray, run, and return the result. Raises the errors of `resilient.errors`.

    pack: the training function and its arguments, by cloudpickle.
    """
    function = pack()  # what can't be sent is refused before Ray is started
    if not ray.is_initialized():
        ray.init(log_to_driver=os.environ.get("RESILIENT_WORKER_LOGS") == "1")
    attempt = _next_attempt(settings)
    stored = store_function(f"{settings.name}/{attempt}", sys.argv, function)
    del function
    job = Job(settings=settings, attempt=attempt, function=stored, secret=secrets.token_hex(16))
    controller = _start_controller(job)
    ended = threading.Event()
    threading.Thread(target=_keep_lease, args=(controller, ended, settings), daemon=True).start()
    try:
        return _follow(controller, progress)
    except BaseException:
        controller.stop.remote("the driver was interrupted")
        _await_end(controller)
        raise
    finally:
        ended.set()
        controller.close.remote()
        _await_gone(job.key, controller)


def _next_attempt(settings: Settings) -> int:
    name = settings.name
    _make_room(settings)
    for other in launch.names(f"{name}/"):
        if other.endswith("/controller"):
            controller = launch.find(other)
            if controller is not None and _says(controller, "driver_lives"):
                raise ResilientError(
                    f"a run named {name!r} is going on in this cluster ({other}) and its driver lives: wait for it, "
                    "stop it, or give this one another name"
                )
            if controller is not None:
                launch.end(controller)  # orphaned: what it would still start would be in this attempt's way
    drop_stored(name)
    # What earlier ones have left on storage tells their numbers even when the cluster is a new one.
    attempt = first_attempt(settings.checkpoint, name) if settings.checkpoint is not None else 1
    while not launch.create_key(f"attempt/{name}/{attempt}", b""):
        attempt += 1
    return attempt


def _make_room(settings: Settings) -> None:
    """Runs that have ended are shown for a while, perhaps under the name or at the port that this one is to have."""
    at_any_port = settings.observe is None or address_of(settings.observe, "")[1] == 0
    found = [name for name in launch.names(f"{settings.name}/" if at_any_port else "") if name.endswith("/controller")]
    going = {name for name in found if (other := launch.find(name)) is not None and _says(other, "gives_way")}
    deadline = time.monotonic() + MAKE_ROOM_LIMIT_S
    while going.intersection(launch.names("")) and time.monotonic() < deadline:
        time.sleep(POLL_EVERY_S)


def _says(controller: Any, question: str) -> bool:
    """No, if it does not answer."""
    try:
        return bool(ray.get(getattr(controller, question).remote(), timeout=5.0))
    except (RayActorError, GetTimeoutError):
        return False


def _start_controller(job: Job) -> Any:
    head = [node["NodeID"] for node in ray.nodes() if "node:__internal_head__" in node["Resources"]]
    node = head[0] if head else ray.get_runtime_context().get_node_id()
    return (
        ray.remote(Controller)
        .options(
            name=f"{job.key}/controller",
            namespace=launch.NAMESPACE,
            lifetime="detached",
            num_cpus=0,
            max_restarts=-1,
            # Nowhere else: a host that dies must never take the controller along. Without the head all is over anyway.
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
        )
        .remote(job)
    )


def _keep_lease(controller: Any, ended: threading.Event, settings: Settings) -> None:
    while not ended.wait(settings.driver_lease_s / 10):
        controller.renew.remote()


def _follow(controller: Any, progress: Progress) -> Result:
    rows = Spilled[dict[str, float]]()
    recoveries = Spilled[dict[str, Any]]()
    known = Known()
    answered_at, limit_s = time.monotonic(), CONTROLLER_START_LIMIT_S
    while True:
        try:
            news = ray.get(controller.poll.remote(_last_step(rows), known), timeout=CONTROLLER_LIMIT_S)
        except (RayActorError, GetTimeoutError) as error:
            if time.monotonic() - answered_at > limit_s:
                raise RunLost(
                    f"the controller has not answered for {limit_s:.0f} s ({error}); "
                    "the cluster's head node may be gone"
                ) from error
            time.sleep(POLL_EVERY_S)
            continue
        answered_at, limit_s = time.monotonic(), CONTROLLER_LIMIT_S
        if news["back_to"] is not None:
            rows.truncate(bisect_left(rows, news["back_to"], key=lambda row: row["step"]))
        for row in news["rows"]:
            if int(row["step"]) > _last_step(rows):
                rows.append(row)
        recoveries.extend(news["recoveries"])
        known = news["known"]
        news["rows"], news["recoveries"] = rows, recoveries
        progress(news)
        if news["outcome"] is not None:
            return _result(news)
        time.sleep(POLL_EVERY_S)


def _last_step(rows: Sequence[dict[str, float]]) -> int:
    return int(rows[-1]["step"]) if rows else -1


def _result(news: dict[str, Any]) -> Result:
    outcome, reason = news["outcome"]["outcome"], news["outcome"]["reason"]
    if outcome == "finished":
        return Result(
            step=news["step"],
            metrics=news["rows"],
            recoveries=news["recoveries"],
            bubbles=news["bubbles"],
            snapshots=news["snapshots"],
            checkpoints=news["checkpoints"],
            digest=news["outcome"]["digest"],
            returned=loaded(news["value"]),
        )
    if outcome == "failed":
        raise TrainingFailed(reason) if "raised on rank" in reason else RunLost(reason)
    raise RunStopped(reason)


def _await_end(controller: Any) -> None:
    deadline = time.monotonic() + 10.0
    while time.monotonic() < deadline:
        try:
            if ray.get(controller.poll.remote(-1, Known()), timeout=5.0)["outcome"] is not None:
                return
        except (RayActorError, GetTimeoutError):
            return
        time.sleep(POLL_EVERY_S)


def _await_gone(key: str, controller: Any) -> None:
    """Until every process of this attempt has ended, so that nothing is left when the caller goes on; but for a
    controller which does nothing more than to show to those who scrape it that the run has ended."""
    deadline = time.monotonic() + 20.0
    while (names := launch.names(f"{key}/")) and time.monotonic() < deadline:
        if names == [f"{key}/controller"] and _says(controller, "lingers"):
            return
        time.sleep(POLL_EVERY_S)
