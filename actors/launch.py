"""Placing, starting and ending processes on Ray, and the keys a run keeps in the cluster.

All actors are detached, in the namespace `resilient`, under names that are used once. Ray restarts
only the controller; ranks and keepers get new incarnations under new names.
"""

from __future__ import annotations

import contextlib
import math
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import ray
from ray._private.state import state  # nothing public tells of drains, nor what is free on each node
from ray.exceptions import ActorDiedError
from ray.experimental import internal_kv
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from .folders import home
from .keeper import Keeper, KeeperSpec
from .rank import Body, Host, Rank, RankSpec

NAMESPACE = "resilient"
MEMORY = "/dev/shm"
FOLDER = str(home(MEMORY))


def folder_of(key: str, node: str, memory: str = MEMORY) -> str:
    """Where a run keeps its files on one node; several nodes may share a machine in tests."""
    return str(home(memory) / f"{key.replace('/', '-')}-{node[:12]}")


def start_rank(
    spec: RankSpec,
    *,
    resources: dict[str, float],
    controller: Any,
    keeper: Any,
    make_body: Callable[[Host], Body],
) -> Any:
    """Start a rank on its node; returns its handle at once."""
    custom = {name: amount for name, amount in resources.items() if name not in ("CPU", "GPU")}
    return (
        ray.remote(Rank)
        .options(
            name=f"{spec.key}/rank/{spec.member}",
            namespace=NAMESPACE,
            lifetime="detached",
            num_cpus=resources.get("CPU", 1),
            num_gpus=resources.get("GPU", 0),
            resources=custom,
            max_restarts=0,
            get_if_exists=True,  # a call that is repeated since its answer was lost
            scheduling_strategy=NodeAffinitySchedulingStrategy(spec.node, soft=False),
        )
        .remote(spec, controller, keeper, make_body)
    )


def if_it_never_begins(process: Any, then: Callable[[], None]) -> None:
    """then: called, in a thread of Ray's, if this rank ends before it has begun. Perhaps no keeper watches it, since
    the one that it was told of has died."""

    def answered(future: Future[int]) -> None:
        if isinstance(future.exception(), ActorDiedError):
            then()

    process.process.remote().future().add_done_callback(answered)


def start_keeper(spec: KeeperSpec, *, controller: Any) -> Any:
    return (
        ray.remote(Keeper)
        .options(
            name=f"{spec.key}/keeper/{spec.node}/{spec.incarnation}",
            namespace=NAMESPACE,
            lifetime="detached",
            num_cpus=0,
            max_restarts=0,
            get_if_exists=True,  # a call that is repeated since its answer was lost
            scheduling_strategy=NodeAffinitySchedulingStrategy(spec.node, soft=False),
        )
        .remote(spec, controller)
    )


def find(name: str) -> Any | None:
    """An actor by name, or None when there is none alive."""
    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return None


def names(prefix: str) -> list[str]:
    """Names of live actors that begin so."""
    listed = ray.util.list_named_actors(all_namespaces=True)
    found = (entry["name"] for entry in listed if entry["namespace"] == NAMESPACE)
    return sorted(name for name in found if name.startswith(prefix))


def end(handle: Any) -> None:
    """End an actor's process, if it still has one."""
    with contextlib.suppress(Exception):  # already gone, whichever way Ray says so
        ray.kill(handle, no_restart=True)


def wait(calls: list[Any], limit_s: float) -> None:
    """Until all of these calls have been answered or failed, or the time is up."""
    if calls:
        ray.wait(calls, num_returns=len(calls), timeout=limit_s)


def capacities(resources: dict[str, float]) -> dict[str, int]:
    """Live nodes, with the number of ranks of these resources that each could hold, if nobody else used it."""
    return {node["NodeID"]: _fit(resources, node["Resources"]) for node in ray.nodes() if node["Alive"]}


def free_now(resources: dict[str, float]) -> dict[str, int]:
    """Nodes, with the number of ranks of these resources for which there is a place now, a moment ago."""
    return {node: _fit(resources, free) for node, free in state.available_resources_per_node().items()}


def _fit(resources: dict[str, float], there: dict[str, float]) -> int:
    wanted = {name: amount for name, amount in resources.items() if amount > 0}
    return min((_times(name, amount, there.get(name, 0.0)) for name, amount in wanted.items()), default=1)


def _times(name: str, amount: float, there: float) -> int:
    """How often this amount is there. Ray counts in steps of 1e-4, and takes a part of a GPU from a single one."""
    if name == "GPU" and amount < 1:
        whole, rest = divmod(there + _STEP, 1.0)
        return int(whole) * int((1 + _STEP) // amount) + int((rest + _STEP) // amount)
    return int((there + _STEP) // amount)


def lacking(resources: dict[str, float]) -> str:
    """Why no live node could ever hold a rank of these resources; "" if one could, or if there is no node."""
    totals = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    most = {name: max((total.get(name, 0.0) for total in totals), default=amount) for name, amount in resources.items()}
    short = [
        f"{name}: {amount:g} (the most that one has is {most[name]:g})"
        for name, amount in sorted(resources.items())
        if most[name] < amount
    ]
    if short:
        return f"no node has what resources= asks for each rank: {', '.join(short)}"
    fits = any(all(total.get(name, 0.0) >= amount for name, amount in resources.items()) for total in totals)
    return "" if fits or not totals else f"no node has all that resources= asks for each rank: {resources}"


def draining() -> dict[str, float]:
    """Nodes that the cluster is about to end, and when: seconds of the wall clock, infinite if it has not said."""
    found: dict[str, int] = state.get_draining_nodes()  # milliseconds, 0 for none
    return {node: by / 1000 if by > 0 else math.inf for node, by in found.items()}


def domains() -> dict[str, str]:
    """Failure domains by node: the availability zone, or what the node's label `resilient-domain` says."""
    found = {}
    for node in ray.nodes():
        labels = node.get("Labels") or {}
        found[node["NodeID"]] = (
            labels.get("resilient-domain") or labels.get("ray.io/availability-zone") or node["NodeID"]
        )
    return found


def create_key(key: str, value: bytes, creator: str = "") -> bool:
    """Create a key; False, and nothing changed, if it exists.

    A call whose answer is lost with the cluster's head is repeated by Ray, and then finds what it has itself created:
    what is stored says which call that was. Whoever repeats a call gives the same `creator` (see `new_creator`) again.
    """
    stored = value + _END + (creator or new_creator()).encode()
    existed = internal_kv._internal_kv_put(_full(key), stored, overwrite=False, namespace=_NAMESPACE)
    return not existed or internal_kv._internal_kv_get(_full(key), namespace=_NAMESPACE) == stored


def new_creator() -> str:
    return uuid.uuid4().hex


def write_key(key: str, value: bytes) -> None:
    """Create a key, or overwrite it."""
    internal_kv._internal_kv_put(_full(key), value + _END, overwrite=True, namespace=_NAMESPACE)


def read_key(key: str) -> bytes | None:
    stored: bytes | None = internal_kv._internal_kv_get(_full(key), namespace=_NAMESPACE)
    return None if stored is None else stored.rpartition(_END)[0]


def list_keys(prefix: str) -> list[str]:
    found = internal_kv._internal_kv_list(_full(prefix), namespace=_NAMESPACE)
    return sorted(key.decode().removeprefix(_full("")) for key in found)


def delete_keys(prefix: str) -> None:
    internal_kv._internal_kv_del(_full(prefix), del_by_prefix=True, namespace=_NAMESPACE)


_STEP = 1e-4
_NAMESPACE = b"resilient"
_END = b"\n"
"""Of a key's value; what follows says who has created it."""


def _full(key: str) -> str:
    return f"resilient/{key}"
