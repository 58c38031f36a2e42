"""The doctor visits a real cluster."""

from __future__ import annotations

from typing import Any

import ray

from resilient.doctor import judge
from resilient.doctor_cluster import visit


def test_every_node_is_visited_and_nothing_is_left(cluster: Any) -> None:
    found = visit()
    living = sorted(node["NodeID"] for node in ray.nodes() if node["Alive"])
    assert [each.node for each in found.nodes] == living
    assert all(each.reached_s is not None and abs(each.ahead_s) < 1.0 for each in found.nodes)
    assert not [each for each in judge(found, 1 << 20) if each.verdict == "bad"]
    assert ray.util.list_named_actors() == []
