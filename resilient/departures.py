"""Nodes and ranks that are to leave, on the controller's side: who asked for it, and the keepers that are let go.

What was asked for is on record before it is acted upon, so that a restarted controller knows it. The cluster's own
notices are repeated by the cluster.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from actors import launch
from actors.notice import LeaveAsked

from .core.events import Event, NodeDrained, NodeLeaving, RankLeaving
from .errands import Errands
from .ledger import Ledger
from .workers import Workers

CLEAN_UP_LIMIT_S = 30.0


class Departures:
    def __init__(
        self,
        ledger: Ledger,
        workers: Workers,
        errands: Errands,
        *,
        saves: bool,
        put: Callable[[Event], None],
        forget: Callable[[str], None],
    ) -> None:
        """saves: whether keepers make snapshots durable. put: takes in what happens later. forget: called when the
        keeper of a node is not counted with any more."""
        self._ledger, self._workers, self._errands, self._saves = ledger, workers, errands, saves
        self._put, self._forget = put, forget
        self._saving: set[str] = set()
        """Nodes whose keepers are let go as soon as they have saved what they are to save."""
        self._by: dict[str, float] = {}
        """As the cluster has said last: by node, when it ends."""

    # Who is to leave

    def asked(self, ask: LeaveAsked) -> None:
        self._errands.run(lambda: self._ledger.leaves(ask), lambda _: self._put(_event(ask)))

    def on_record(self) -> list[Event]:
        return [_event(ask) for ask in self._ledger.leaving()]

    def noticed(self, draining: Mapping[str, float]) -> list[Event]:
        """The cluster's notices, of which some may be new. draining: by node, when it ends; infinite if not known."""
        news = {node: by for node, by in sorted(draining.items()) if self._by.get(node) != by}
        self._by.update(news)
        now = time.time()
        why = "the cluster drains it"
        return [NodeLeaving(node=node, why=why, left_s=max(0.0, by - now)) for node, by in news.items()]

    # Keepers

    def let_go(self, node: str) -> None:
        if self._saves and node in self._workers.keepers:
            self._saving.add(node)
            self._workers.keepers[node].finish_saving.remote()
        else:
            self._saving.discard(node)
            self._end_keeper(node)

    def saved(self, node: str) -> None:
        """Its keeper has nothing more to save."""
        if node in self._saving:
            self._saving.discard(node)
            self._end_keeper(node)

    def replaced(self, node: str) -> None:
        """Another keeper runs there, which has to be asked anew."""
        if node in self._saving:
            self._errands.run(lambda: None, lambda _: self.let_go(node))  # it starts by an errand of its own

    def _end_keeper(self, node: str) -> None:
        keeper = self._workers.keepers.pop(node, None)
        self._workers.forget_node(node)
        self._forget(node)
        threading.Thread(target=self._clean_up, args=(node, keeper), name="letting go", daemon=True).start()

    def _clean_up(self, node: str, keeper: Any) -> None:
        if keeper is not None:
            launch.wait([keeper.clean_up.remote()], CLEAN_UP_LIMIT_S)
            launch.end(keeper)
        self._put(NodeDrained(node=node))


def _event(ask: LeaveAsked) -> Event:
    if ask.member:
        return RankLeaving(member=ask.member, why=ask.why, left_s=ask.left_s)
    return NodeLeaving(node=ask.node, why=ask.why, left_s=ask.left_s)


def drain(node: str) -> LeaveAsked:
    """As the command asks for it: there is no hurry."""
    return LeaveAsked(node=node, member=0, why="it was asked for", left_s=math.inf)
