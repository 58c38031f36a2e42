"""What the user hears of checkpoints: each piece of news once, however often the controller is restarted."""

from __future__ import annotations

import queue
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors import launch
from actors.saving import SaveNews
from resilient.checkpoints import Saved, first_attempt, look
from resilient.core.events import StorageSeen
from resilient.job import Checkpoint
from resilient.ledger import Ledger
from resilient.restoring import fetch_stored
from snapshot.core.inventory import SnapshotKey
from tests.checkpoints import build, files_in, snapshot_of


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
    assert failed.kind == "checkpoint failed" and failed.reason == "node aaaabbbb: checkpoints: full"


def test_what_a_keeper_counted_that_died_before_the_controller_stays_counted(ledger: Ledger) -> None:
    ledger.has_said("aaaabbbbcccc/7", news(40, 4, failures=2))
    saved = Saved(news=ledger.said())
    saved.heard("aaaabbbbcccc/8", news(50, 1))
    assert (saved.summary()["committed"], saved.summary()["failures"], saved.summary()["durable"]) == (5, 2, 50)


def seen(checkpoint: Checkpoint, run: str) -> list[tuple[int, int, str]]:
    found: queue.SimpleQueue[StorageSeen] = queue.SimpleQueue()
    look(checkpoint, run, 1, found.put)
    answer = found.get(timeout=30.0)
    assert not answer.error, answer.error
    return [(each.key.attempt, each.key.step, each.folder) for each in answer.checkpoints]


def test_a_run_is_shown_its_own_checkpoints_or_those_to_begin_from(tmp_path: Path) -> None:
    former, own = tmp_path / "former", tmp_path / "own"
    state = snapshot_of(build(), 7, attempt=5)
    state.save(files_in(former))
    checkpoint = Checkpoint(str(own), resume_from=str(former))
    with pytest.raises(ValueError, match=r"'gpt' keeps its checkpoints there.*step 7.*this run is 'later'"):
        first_attempt(Checkpoint(str(former)), "later")
    assert first_attempt(checkpoint, "later") == 1 and first_attempt(Checkpoint(str(former)), "gpt") == 6
    ((attempt, step, folder),) = seen(checkpoint, "later")
    assert (attempt, step, folder) == (0, 7, f"{former}/{state.folder}"), "older than anything of its own"
    assert fetch_stored(str(own), folder).nbytes == len(state.data)
    mine = snapshot_of(build(), 3, run="later", token="00000009")
    mine.save(files_in(own))
    assert seen(checkpoint, "later") == [(1, 3, mine.folder)]
    assert seen(Checkpoint(str(former)), "later") == []


@pytest.mark.parametrize("runs", [(), ("one", "other")])
def test_where_to_begin_from_has_one_runs_checkpoints(tmp_path: Path, runs: tuple[str, ...]) -> None:
    for number, run in enumerate(runs):
        snapshot_of({"run.state": {"x": 1}}, 7, run=run, token=f"0000000{number}").save(files_in(tmp_path / "former"))
    checkpoint = Checkpoint(str(tmp_path / "own"), resume_from=str(tmp_path / "former"))
    with pytest.raises(ValueError, match=r"resume_from=.*(several runs \('one', 'other'\)|no complete checkpoint)"):
        first_attempt(checkpoint, "later")


def test_a_final_state_that_is_not_on_storage_is_told_with_the_reason() -> None:
    saved = Saved()
    saved.heard("aaaabbbbcccc/7", news(40, 4))
    assert saved.missed(40) == saved.summary()["missed"] == ""
    assert saved.missed(43).endswith(
        "of step 43, is not on storage; the newest checkpoint is of step 40: no slot was free for it"
    )
    saved.heard("aaaabbbbcccc/7", news(40, 4, failures=1))
    assert saved.missed(43).endswith(": full") and saved.summary()["missed"] == saved.missed(43)
    assert "there is no checkpoint" in Saved().missed(3)
