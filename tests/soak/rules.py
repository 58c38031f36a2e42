"""Which faults the soak chooses, and which of them are spared because no run could be asked to survive them.

A run with checkpoints promises to survive everything but the loss of its head node, driver or storage. What it
can't do is to go on while it is hit faster than it can recover. So after a few faults without a step between
them it is left in peace until there is one; that has to come in time, or the soak has failed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from resilient.faults import Act, Kind

WEIGHTS: Mapping[Kind, float] = {
    "kill": 10.0,
    "stop": 3.0,
    "cut": 3.0,
    "all": 2.0,
    "node": 2.0,
    "keeper": 2.0,
    "controller": 2.0,
    "corrupt": 4.0,
}
SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 3.0
MOST_FAULTS_WITHOUT_A_STEP = 3
FEWEST_NODES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """nodes: that are up. unanswered: faults since the last step that was committed. durable: some checkpoint is."""

    nodes: int
    unanswered: int
    durable: bool


def why_spared(act: Act, standing: Standing) -> str:
    """Empty if it is to be done."""
    if not standing.durable:
        return "no checkpoint is durable yet"
    if standing.unanswered >= MOST_FAULTS_WITHOUT_A_STEP:
        return f"{standing.unanswered} faults since the last step"
    if act.kind == "node" and standing.nodes <= FEWEST_NODES:
        return f"only {standing.nodes} nodes are up"
    return ""
