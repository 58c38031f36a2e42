"""What the user hears of checkpoints: each piece of news once, however often the controller is restarted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from actors import launch
from actors.saving import SaveNews
from resilient.checkpoints import Saved
from resilient.ledger import Ledger
from snapshot.core.inventory import SnapshotKey


def news(step: int, committed: int, failures: int = 0) -> SaveNews:
    durable = SnapshotKey(attempt=1, branch=0, step=step, generation=1)
    return SaveNews(durable=durable, committed=committed, failures=failures, last_failure="full" if failures else "")


@pytest.fixture
def ledger(monkeypatch: pytest.MonkeyPatch) -> Ledger:
    keys: dict[str, bytes] = {}
    monkeypatch.setattr(launch, "write_key", keys.__setitem__)
    monkeypatch.setattr(launch, "read_key", keys.get)
    monkeypatch.setattr(launch, "list_keys", lambda prefix: sorted(key for key in keys if key.startswith(prefix)))
    job: Any = SimpleNamespace(key="run/1", attempt=1, settings=SimpleNamespace(name="run"))
    return Ledger(job)


def test_a_restarted_controller_says_only_what_has_happened_since(ledger: Ledger) -> None:
    before = Saved()
    (said,) = before.heard("aaaabbbbcccc/7", news(40, 4))
    assert said.reason.startswith("the checkpoint of step 40 is durable")
    ledger.has_said("aaaabbbbcccc/7", news(40, 4))
    after = Saved(news=ledger.said())
    assert after.heard("aaaabbbbcccc/7", news(40, 4)) == []
    assert len(after.heard("aaaabbbbcccc/7", news(50, 5))) == 1
    (failed,) = after.heard("aaaabbbbcccc/7", news(50, 5, failures=1))
    assert failed.kind == "checkpoint failed" and failed.reason == "node aaaabbbb: checkpoint not written: full"


def test_what_a_keeper_counted_that_died_before_the_controller_stays_counted(ledger: Ledger) -> None:
    ledger.has_said("aaaabbbbcccc/7", news(40, 4, failures=2))
    saved = Saved(news=ledger.said())
    saved.heard("aaaabbbbcccc/8", news(50, 1))
    assert (saved.summary()["committed"], saved.summary()["failures"], saved.summary()["durable"]) == (5, 2, 50)
