"""The doctor's visit: an actor on every node says what it is like there, and tries to reach the next one."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from .doctor import MEMORY, Cluster, NodeFacts, changed_settings, facts

ANSWER_LIMIT_S = 60.0
CONNECT_LIMIT_S = 3.0


class Visitor:
    """Actor, one per node."""

    def __init__(self) -> None:
        self._listener: socket.socket | None = None

    def facts(self, node: str, object_store_bytes: int, memory: str, sweep: bool) -> NodeFacts:
        return facts(node, object_store_bytes, memory, sweep)

    def clock(self) -> float:
        return time.time()

    def listen(self) -> tuple[str, int]:
        """On a free port of the node's own address."""
        host = ray.util.get_node_ip_address()
        self._listener = socket.create_server((host, 0))
        return host, self._listener.getsockname()[1]

    def reach(self, address: tuple[str, int]) -> tuple[float | None, str]:
        """How long connecting took, or why it failed."""
        began = time.monotonic()
        try:
            socket.create_connection(address, CONNECT_LIMIT_S).close()
        except OSError as error:
            return None, str(error)
        return time.monotonic() - began, ""

    def close(self) -> None:
        if self._listener is not None:
            self._listener.close()


def visit(memory: str = MEMORY, *, sweep: bool = False) -> Cluster:
    """memory: where runs keep snapshots; with sweep, what is left there of runs that are gone is removed.

    All living nodes of the cluster that this process has joined. Raises ray's GetTimeoutError if one is silent."""
    nodes = sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: str(node["NodeID"]))
    visitors = [_visitor(node["NodeID"]) for node in nodes]
    try:
        stores = [int(node["Resources"].get("object_store_memory", 0)) for node in nodes]
        found = _all(
            visitor.facts.remote(node["NodeID"], store, memory, sweep)
            for visitor, node, store in zip(visitors, nodes, stores, strict=True)
        )
        reached = _links(visitors)
        return Cluster(
            nodes=[
                replace(each, ahead_s=_ahead_s(visitor), reached_s=reached_s, unreachable=why)
                for each, visitor, (reached_s, why) in zip(found, visitors, reached, strict=True)
            ],
            settings=changed_settings(),
        )
    finally:
        _all(visitor.close.remote() for visitor in visitors)
        for visitor in visitors:
            ray.kill(visitor)


def _visitor(node: str) -> Any:
    strategy = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(Visitor).options(num_cpus=0, scheduling_strategy=strategy).remote()


def _links(visitors: Sequence[Any]) -> list[tuple[float | None, str]]:
    """By node, whether the one before it can connect to it: in a ring, so that many nodes take no longer than few."""
    addresses = _all(visitor.listen.remote() for visitor in visitors)
    before = [visitors[-1], *visitors[:-1]]
    return _all(visitor.reach.remote(address) for visitor, address in zip(before, addresses, strict=True))


def _ahead_s(visitor: Any) -> float:
    asked_at = time.time()
    said = float(ray.get(visitor.clock.remote(), timeout=ANSWER_LIMIT_S))
    return said - (asked_at + time.time()) / 2


def _all(answers: Any) -> list[Any]:
    found: list[Any] = ray.get(list(answers), timeout=ANSWER_LIMIT_S)
    return found
