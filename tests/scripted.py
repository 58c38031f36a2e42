"""A run of which a test says what happens to it, as its controller would show it.

Figures come from the real chronicle; a second passes, and a step is committed, each time that somebody looks.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server

from resilient.core.chronicle import Chronicle
from resilient.core.plan import Address, Place, Plan, Restore
from resilient.core.planner import dealt_anew, unplanned
from resilient.exposition import RunCollector
from resilient.metrics import Seen
from snapshot.core.inventory import SnapshotKey

PLACES = tuple(Place(member=member, node=f"node-{member}", address=Address(host="h", port=1)) for member in (1, 2))
RANKS = [
    {"rank": rank, "node": f"node-{rank}", "state": "computing", "speed": 1.0, "idle": 0.1, "ticked_s_ago": 0.1}
    for rank in range(2)
]


class ScriptedRun:
    """look: what `Told.look` says, beside what follows from the chronicle. grows: what is added to entries of
    look["snapshots"] in each second."""

    def __init__(self, name: str) -> None:
        self.chronicle = Chronicle()
        self.look: dict[str, Any] = {
            **{"run": name, "attempt": 1, "loss": 0.5, "committed_s_ago": 0.5, "recovering_s": 0.0, "waiting_s": 0.0},
            **{"protected_s_ago": 1.0, "durable_s_ago": 60.0, "ranks": RANKS, "others": [{"state": "ready"}]},
            **{"nodes": {"node-0": 1, "node-1": 1}, "leaving": {}, "wanted": {"min": 1, "max": 2, "spares": 1}},
            "snapshots": {
                **{"captured": 5, "skipped": 0, "torn": 0, "blocked_s": 0.1, "interval": 1, "newest": 9},
                **{"protected": 8, "state_bytes": 1000, "mutable_s": 0.1, "protected_s": 0.2, "saves_postponed": 0},
            },
            "checkpoints": {"committed": 1, "failures": 0, "durable": 5, "stored_bytes": 900},
            "outcome": None,
            "steps": None,
            "not_on_record": 0,
            "observe": {"url": None, "events": None, "events_left_out": 0},
        }
        self.grows = {"captured": 1}
        self._now, self._step, self._generation = 0.0, 0, 1
        self._lock = threading.Lock()
        for _ in range(5):
            self._pass(1.0)
            self._commit()

    def seen(self) -> Seen:
        with self._lock:
            self._pass(1.0)
            if self.look["committed_s_ago"] < 1.0:
                self._commit()
            for name, more in self.grows.items():
                self.look["snapshots"][name] += more
            look = {"step": self._step, "step_s": 1.0, "generation": self._generation}
            return Seen(figures=self.chronicle.figures, look={**self.look, **look})

    def lose_a_rank(self) -> None:
        """The other one goes on, and the lost one is back at once."""
        with self._lock:
            self.chronicle.lost(2, "node-1", "killed", 0.1, self._now, node_lost=False)
            before = self._dealt_anew("initial")
            self._generation += 1
            self._recover(unplanned(before, self._generation, [1], "lost rank 1"), form_s=0.1)

    def go_back(self, form_s: float) -> None:
        """All ranks are lost, and it takes so long until they are level again."""
        with self._lock:
            self.chronicle.lost(1, "node-0", "killed", 0.1, self._now, node_lost=True)
            self._step -= 2
            key = SnapshotKey(attempt=1, branch=0, step=self._step, generation=self._generation)
            self._generation += 1
            self._recover(self._dealt_anew("restored", Restore(key=key)), form_s)

    def _dealt_anew(self, kind: Any, restore: Restore | None = None) -> Plan:
        return dealt_anew(
            generation=self._generation,
            base=self._generation - 1,
            kind=kind,
            places=list(PLACES),
            joiners=[],
            micro_batches=2,
            reason="test",
            restore=restore,
        )

    def _recover(self, plan: Plan, form_s: float) -> None:
        self.chronicle.created(plan, self._now, dealt_again=1)
        self._pass(form_s)
        self.chronicle.formed(self._generation, self._step - 1, self._now)
        self._pass(0.5)
        self._commit()

    def _pass(self, seconds: float) -> None:
        self._now += seconds
        self.chronicle.figures.spent.look(self._now, waits=False)

    def _commit(self) -> None:
        self.chronicle.committed(self._generation, self._step, self._now)
        self._step += 1


@contextmanager
def served(collector: RunCollector) -> Iterator[str]:
    """host:port, while it is."""
    registry = CollectorRegistry()
    registry.register(collector)
    server, thread = start_http_server(0, addr="127.0.0.1", registry=registry)
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
