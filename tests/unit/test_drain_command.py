"""`resilient drain`: which node is meant, and what is made of what the runs say."""

from __future__ import annotations

from typing import Any

import pytest

from resilient.drain import STUCK_LOOKS, Drain, node_named
from resilient.status import in_words

NODES = [
    {"NodeID": "aaaa1111", "NodeManagerAddress": "10.0.0.1", "Alive": True},
    {"NodeID": "aabb2222", "NodeManagerAddress": "10.0.0.2", "Alive": True},
    {"NodeID": "aaaa3333", "NodeManagerAddress": "10.0.0.1", "Alive": False},
]


@pytest.mark.parametrize(("asked", "node"), [("aaaa", "aaaa1111"), ("10.0.0.2", "aabb2222"), ("aabb2222", "aabb2222")])
def test_a_node_is_named_by_its_id_the_beginning_of_it_or_its_address(asked: str, node: str) -> None:
    assert node_named(asked, NODES) == node


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ("aa", "node 'aa': is several nodes: aaaa1111 (10.0.0.1), aabb2222 (10.0.0.2)"),
        ("aaaa3333", "node 'aaaa3333': is none of the live nodes: aaaa1111 (10.0.0.1), aabb2222 (10.0.0.2)"),
        ("", "node '': is several nodes"),
    ],
)
def test_what_is_not_one_node_is_said(asked: str, why: str) -> None:
    with pytest.raises(ValueError) as raised:
        node_named(asked, NODES)
    assert str(raised.value).startswith(why)


def leaving(state: str = "leaving", waits_for: str = "", stuck: str = "") -> dict[str, Any]:
    shown = {"state": state, "why": "it was asked for", "waits_for": waits_for, "stuck": stuck}
    return {"leaving": {"aaaa1111": shown}, "outcome": None}


def test_a_drain_is_asked_for_until_it_is_known_and_watched_until_it_is_done() -> None:
    asked = []
    drain = Drain(run="gpt", attempt=1, node="aaaa1111")
    for _ in range(2):
        drain.seen({"leaving": {}, "outcome": None}, ask=lambda: asked.append("asked"))
    assert (len(asked), drain.state) == (2, "leaving")
    drain.seen(leaving(waits_for="1 rank to leave it"), ask=lambda: asked.append("asked"))
    assert str(drain) == "gpt, attempt 1: node aaaa1111: is to leave (it was asked for): waits for 1 rank to leave it"
    drain.seen(leaving("drained"), ask=lambda: asked.append("asked"))
    assert (len(asked), drain.state, drain.why) == (2, "drained", "drained: nothing of the run is on it")


def test_a_node_that_stays_stuck_is_given_up() -> None:
    drain = Drain(run="gpt", attempt=1, node="aaaa1111")
    looks = [leaving(stuck="not yet: no room")] * (STUCK_LOOKS - 1)
    for view in [*looks, leaving(waits_for="2 ranks to leave it"), *looks]:
        drain.seen(view, ask=lambda: None)
        assert drain.state == "leaving"
    drain.seen(looks[0], ask=lambda: None)
    assert (drain.state, drain.why) == ("stuck", "is to leave (it was asked for): not yet: no room")


def test_a_run_that_ends_has_left_too() -> None:
    drain = Drain(run="gpt", attempt=1, node="aaaa1111")
    drain.seen({"leaving": {}, "outcome": {"outcome": "finished"}}, ask=lambda: None)
    assert drain.state == "ended"


def test_it_is_shown() -> None:
    assert in_words(leaving("drained")["leaving"]["aaaa1111"]) == "drained: nothing of the run is on it"
