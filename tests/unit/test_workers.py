"""What closed connections say about a node."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from actors import launch
from resilient.job import Job, Snapshot, settings_from
from resilient.workers import Workers


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Workers:
    monkeypatch.setattr(launch, "start_keeper", lambda spec, controller: SimpleNamespace())
    monkeypatch.setattr(launch, "end", lambda handle: None)
    settings = settings_from(
        name="r",
        workers=1,
        spares=0,
        resources=None,
        seed=0,
        reduction="exact",
        detection_s=2.0,
        wait_for_nodes_s=60.0,
        allow_different_bits=False,
        snapshot=Snapshot(),
    )
    found = Workers(Job(settings=settings, attempt=1, function=b"", secret="x"), None)
    found.start_keeper("n")
    return found


def test_a_node_whose_keeper_and_ranks_have_all_ended_is_gone(workers: Workers) -> None:
    assert workers.lifeline_closed("rank 5 n", [5], 0.0) is None
    assert workers.lifeline_closed("keeper 0 n", [5], 0.1) == "n"


def test_a_rank_that_ends_while_its_keeper_is_replaced_says_nothing_about_the_node(workers: Workers) -> None:
    assert workers.lifeline_closed("keeper 0 n", [5], 0.0) is None and workers.lonely(10.0) == ["n"]
    workers.forget_keeper("n")
    workers.start_keeper("n")
    assert workers.lifeline_closed("rank 5 n", [5], 11.0) is None
    assert workers.lifeline_closed("keeper 0 n", [5], 12.0) == "n", "the new one has ended, too"
