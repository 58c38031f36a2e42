"""What a cluster is like for a run, before it begins: gathered on every node, then judged, with plain advice.

The judging is pure: facts in, findings out.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Literal

from actors import folders
from actors.folders import Leftover

from .cli_output import in_bytes

Verdict = Literal["good", "warning", "bad"]
PACKAGES = ("torch", "ray", "numpy", "zstandard", "resilient-runtime")
MEMORY = "/dev/shm"
SLOTS = 5
"""Copies of a node's share of the state that may be kept there, a checkpoint's among them."""
FEW_FILES = 4096
SKEW_S = 1.0
LITTLE_SHARED = 1 << 30
SLOW_LINK_S = 0.05
HASTY_MS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFacts:
    """One node's."""

    node: str
    host: str
    python: str
    versions: Mapping[str, str]
    """Of PACKAGES; "" for one that is not there."""
    codec: str
    """What computes parity."""
    shared_bytes: int
    shared_free_bytes: int
    memory_bytes: int
    object_store_bytes: int
    """What Ray may take of shared memory."""
    open_files: int
    ahead_s: float = 0.0
    """By how much its clock is ahead of the asker's."""
    reached_s: float | None = 0.0
    """How long the node before took to connect to a free port here; None if it could not."""
    unreachable: str = ""
    """Why not."""
    left: Sequence[Leftover] = ()
    """What runs that are gone have left in memory."""
    swept: Sequence[Leftover] = ()
    """What of it was removed just now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    what: str
    verdict: Verdict
    found: str
    advice: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    nodes: Sequence[NodeFacts]
    settings: Mapping[str, str] = field(default_factory=dict)
    """Of Ray's health checks, that somebody has changed, by name."""


def facts(node: str, object_store_bytes: int, memory: str = MEMORY, sweep: bool = False) -> NodeFacts:
    """Of the node that this runs on. sweep: remove what nobody will need of runs that are gone."""
    import psutil

    from snapshot import codec

    runs = folders.home(memory)
    swept = folders.sweep(runs) if sweep else []

    disk = shutil.disk_usage(memory) if Path(memory).is_dir() else None
    return NodeFacts(
        node=node,
        host=socket.gethostname(),
        python=platform.python_version(),
        versions={name: _version(name) for name in PACKAGES},
        codec=codec.backend(),
        shared_bytes=disk.total if disk else 0,
        shared_free_bytes=disk.free if disk else 0,
        memory_bytes=psutil.virtual_memory().total,
        object_store_bytes=object_store_bytes,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        left=folders.leftovers(runs),
        swept=swept,
    )


def changed_settings(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    return {name: value for name, value in sorted(environment.items()) if name.startswith("RAY_health_check")}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


# Judging


def judge(cluster: Cluster, state_bytes: int | None = None) -> list[Finding]:
    """state_bytes: of a state that is to be trained, parameters and optimizer together, if that is known."""
    return [
        *_same("Python", {each.node: each.python for each in cluster.nodes}),
        *(
            finding
            for name in PACKAGES
            for finding in _same(name, {each.node: each.versions.get(name, "") for each in cluster.nodes})
        ),
        *_each("parity", cluster.nodes, _codec),
        *_each("shared memory", cluster.nodes, lambda node: _shared(node, len(cluster.nodes), state_bytes)),
        *_each("left in memory", cluster.nodes, _left),
        *_each("open files", cluster.nodes, _files),
        *_each("clocks", cluster.nodes, _clock),
        *_each("ports", cluster.nodes, _ports),
        *_health_checks(cluster.settings),
    ]


def _same(name: str, versions: Mapping[str, str]) -> Iterator[Finding]:
    kinds = sorted(set(versions.values()))
    if "" in kinds:
        lacking = ", ".join(node[:8] for node, version in sorted(versions.items()) if not version)
        yield Finding(what=name, verdict="bad", found=f"not installed on {lacking}", advice="install it on all nodes")
    elif len(kinds) > 1:
        yield Finding(
            what=name,
            verdict="bad",
            found=" and ".join(kinds),
            advice="have the same version everywhere: others compute other bits, or can't read each other's messages",
        )
    else:
        yield Finding(what=name, verdict="good", found=kinds[0])


def _each(what: str, nodes: Sequence[NodeFacts], look: Callable[[NodeFacts], Finding]) -> Iterator[Finding]:
    """One finding where all are well, else one for each node that is not."""
    found = [look(node) for node in nodes]
    bad = [
        Finding(what=what, verdict=each.verdict, found=f"node {node.node[:8]}: {each.found}", advice=each.advice)
        for node, each in zip(nodes, found, strict=True)
        if each.verdict != "good"
    ]
    yield from bad or found[:1]


def _codec(node: NodeFacts) -> Finding:
    if node.codec.startswith("isal"):
        return Finding(what="parity", verdict="good", found="ISA-L")
    return Finding(
        what="parity",
        verdict="warning",
        found=f"computed by {node.codec}, many times slower than ISA-L",
        advice="install the package pyeclib, or the system's libisal2",
    )


def _shared(node: NodeFacts, nodes: int, state_bytes: int | None) -> Finding:
    size = f"{in_bytes(node.shared_free_bytes)} of {in_bytes(node.shared_bytes)} free"
    larger = "give /dev/shm more room: docker run --shm-size, in Kubernetes an emptyDir with medium: Memory"
    if not node.shared_bytes:
        return Finding(what="shared memory", verdict="bad", found="there is no /dev/shm", advice=larger)
    left = node.shared_free_bytes - node.object_store_bytes
    if state_bytes is not None:
        needed = -(-state_bytes // nodes) * (SLOTS + 2)  # and parity, of one's own and of others
        if needed > left:
            return Finding(
                what="shared memory",
                verdict="bad",
                found=f"{size}, of which Ray's object store may take {in_bytes(node.object_store_bytes)}; snapshots of "
                f"{in_bytes(state_bytes)} over {nodes} nodes need about {in_bytes(needed)} here",
                advice=f"{larger}; or use more nodes, or a smaller object store (ray start --object-store-memory)",
            )
        return Finding(what="shared memory", verdict="good", found=f"{size}, about {in_bytes(needed)} needed")
    if left < LITTLE_SHARED:
        return Finding(
            what="shared memory",
            verdict="warning",
            found=f"{size}, of which Ray's object store may take {in_bytes(node.object_store_bytes)}",
            advice=f"{larger}; say how large the state is (--state 30GiB) to have it judged",
        )
    return Finding(what="shared memory", verdict="good", found=size)


def _left(node: NodeFacts) -> Finding:
    """Of runs that are gone."""
    swept = f"; {_attempts(node.swept)} removed" if node.swept else ""
    over = [left for left in node.left if left.ended_s > left.lingers_s]
    kept = [left for left in node.left if left.ended_s <= left.lingers_s]
    waits = "; ".join(
        f"{_attempts([left])} kept for {left.lingers_s - left.ended_s:.0f} s more, for the run to be submitted again"
        for left in kept
    )
    if not over:
        found = waits or "nothing of runs that are gone"
        return Finding(what="left in memory", verdict="good", found=f"{found}{swept}")
    return Finding(
        what="left in memory",
        verdict="warning",
        found=f"{_attempts(over)} of runs that are gone{'; ' if waits else ''}{waits}{swept}",
        advice="resilient doctor --sweep removes it, as the next run on that node does",
    )


def _attempts(left: Sequence[Leftover]) -> str:
    return f"{', '.join(each.folder.name for each in left)} ({in_bytes(sum(each.nbytes for each in left))})"


def _files(node: NodeFacts) -> Finding:
    if node.open_files in (-1, resource.RLIM_INFINITY) or node.open_files >= FEW_FILES:
        return Finding(what="open files", verdict="good", found=f"{FEW_FILES} or more may be open")
    return Finding(
        what="open files",
        verdict="warning",
        found=f"only {node.open_files} may be open at a time",
        advice=f"raise the limit to {FEW_FILES} or more (ulimit -n), for Ray as well",
    )


def _clock(node: NodeFacts) -> Finding:
    if abs(node.ahead_s) < SKEW_S:
        return Finding(what="clocks", verdict="good", found=f"within {SKEW_S:g} s of each other")
    return Finding(
        what="clocks",
        verdict="warning",
        found=f"{abs(node.ahead_s):.1f} s {'ahead' if node.ahead_s > 0 else 'behind'}",
        advice="synchronise clocks (chrony, ntp): training does not need it, logs, metrics and checkpoints' dates do",
    )


def _ports(node: NodeFacts) -> Finding:
    if node.reached_s is None:
        return Finding(
            what="ports",
            verdict="bad",
            found=f"no other node could connect to a free port: {node.unreachable}",
            advice="let the cluster's nodes connect to each other on all ports: ranks and keepers listen on free ones",
        )
    if node.reached_s > SLOW_LINK_S:
        return Finding(
            what="ports",
            verdict="warning",
            found=f"connecting took {node.reached_s * 1000:.0f} ms",
            advice="look at the network between the nodes: each step exchanges gradients over it",
        )
    return Finding(what="ports", verdict="good", found="nodes can connect to each other")


def _health_checks(settings: Mapping[str, str]) -> Iterator[Finding]:
    """Of Ray's own, in milliseconds."""
    found = ", ".join(f"{name}={value}" for name, value in settings.items())
    hasty = [
        name for name, value in settings.items() if "timeout" in name and value.isdigit() and int(value) < HASTY_MS
    ]
    if hasty:
        yield Finding(
            what="health checks",
            verdict="warning",
            found=found,
            advice=f"with {hasty[0]} below {HASTY_MS} ms Ray may end nodes that are only busy; a run finds out by "
            "itself who died, and sooner",
        )
    else:
        said = found or "Ray's own settings; a run does not wait for them"
        yield Finding(what="health checks", verdict="good", found=said)
