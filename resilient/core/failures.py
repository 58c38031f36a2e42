"""How much a run may fail before going on is of no use: a budget per hour, and one error that comes back. Pure.

Counted is each rank or node that is lost; not those that leave because they were told to, and not what happened before
this controller came. A machine error (of a device or its driver) replaces the rank. The same one at the same step on
another node is no accident of a machine any more: the data or the code brings it about, and so would every retry.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

HOUR_S = 3600.0
CRASHES_THAT_TELL = 3
"""The same error at the same step, on more than one node."""
CRASHES_ON_ONE_NODE = 5
LONGEST_KEY = 200
MOST_KINDS = 50
"""Of so many errors at some step it is remembered whom they have ended."""


@dataclass(frozen=True, slots=True)
class Crash:
    member: int
    node: str
    text: str


@dataclass(slots=True, kw_only=True)
class Failures:
    per_hour: int | None = None
    """More than so many within an hour end the run; None for no limit."""
    total: int = 0
    _times: deque[float] = field(default_factory=deque)
    _crashes: dict[tuple[int, str], dict[int, Crash]] = field(default_factory=dict)
    """By step and error, then by member."""

    def lost(self, now: float) -> str | None:
        """A rank or a node was lost. Why the run is to end, if it is."""
        self.total += 1
        if self.per_hour is None:
            return None
        self._times.append(now)
        while now - self._times[0] > HOUR_S:
            self._times.popleft()
        if len(self._times) <= self.per_hour:
            return None
        return f"{len(self._times)} failures within an hour, of which max_failures={self.per_hour} are allowed"

    def crashed(self, step: int, crash: Crash) -> str | None:
        """A rank gave up for a machine error. Why the run is to end, if it is."""
        seen = self._crashes.setdefault((step, _kind_of(crash.text)), {})
        seen[crash.member] = crash
        while len(self._crashes) > MOST_KINDS:
            self._crashes.pop(next(iter(self._crashes)))
        nodes = sorted({other.node for other in seen.values()})
        if len(seen) < (CRASHES_THAT_TELL if len(nodes) > 1 else CRASHES_ON_ONE_NODE):
            return None
        where = ", ".join(node[:8] for node in nodes)
        return (
            f"the same machine error has ended {len(seen)} ranks at step {step} (node {where}): it is not a machine's "
            f"fault, since it comes back elsewhere; look at what this step computes\n{crash.text}"
        )


def _kind_of(text: str) -> str:
    """Its last line, without numbers: addresses and times differ."""
    (last,) = text.rstrip().splitlines()[-1:] or [""]
    return "".join(sign for sign in last if not sign.isdigit())[:LONGEST_KEY]
