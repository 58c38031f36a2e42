"""A keeper makes snapshots durable: what it writes is the state of that step, and storage that fails stops nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from actors import saving
from actors.ring import Ring
from actors.saving import SaveSpec
from actors.vault import Vault
from resilient.core.saves import Saves
from resilient.restoring import fetch_stored
from snapshot import store
from snapshot.capture import capture
from snapshot.core.lifecycle import Ordinal
from snapshot.core.stripes import Group
from snapshot.files import StorageError, open_files
from snapshot.stored import Stored
from snapshot.table import StateTable
from tests.unit.test_rank_snapshots import Training, wait_for

Parts = tuple[Training, Vault, Path]


@pytest.fixture
def saved(tmp_path: Path) -> Any:
    """A training whose every second state is made durable by its node's keeper."""
    torch.manual_seed(0)
    vaults: list[Vault] = []

    def make(level: int | None = None, keep: int = 2) -> Parts:
        training = Training(tmp_path / "memory", saves=Saves(every_steps=2))
        spec = SaveSpec(url=str(tmp_path / "disk"), keep=keep, level=level, token="0123abcd")
        vault = Vault(run="r", attempt=1, node="a", folder=training.folder, secret="s", ip="127.0.0.1", save=spec)
        vaults.append(vault)
        vault.ring(Ring(generation=1, group=Group(nodes=("a",), parity=0), shares={"a": (0,)}))
        training.ready()
        return training, vault, tmp_path / "disk"

    yield make
    for vault in vaults:
        vault.close()


def train_until_durable(training: Training, vault: Vault) -> dict[int, StateTable]:
    """Steps until a checkpoint more is there; the states of those that were to be durable."""
    assert vault.saving is not None
    before, states = vault.saving.news.committed, {}
    for _ in range(40):
        kept = training.snapshots._lifecycle.kept
        state = training.step()
        if state is not None and training.snapshots._lifecycle.kept != kept:
            states[training.steps] = state
        training.snapshots.gate()
        wait_for(lambda: vault.saving is not None and not vault.saving._to_write())
        if vault.saving.news.committed > before:
            return states
    raise AssertionError(f"no checkpoint in 40 steps: {vault.saving.news}")


def same(one: StateTable, other: StateTable) -> bool:
    return one.digest() == other.digest()


@pytest.mark.parametrize("level", [None, 1])
def test_what_is_durable_is_the_state_of_its_step(saved: Callable[..., Parts], level: int | None) -> None:
    training, vault, disk = saved(level)
    states = train_until_durable(training, vault)
    files = open_files(str(disk))
    newest = store.newest(files)
    assert newest is not None and newest.key.step in states
    assert Stored.open(files, newest).verify() == []
    table = fetch_stored(str(disk), newest.folder)
    assert same(table, states[newest.key.step])
    training.step()
    assert not same(table, capture(training.objects))


def test_only_so_many_are_kept(saved: Callable[..., Parts]) -> None:
    training, vault, disk = saved(keep=2)
    for _ in range(4):
        train_until_durable(training, vault)
    assert vault.saving is not None
    vault.saving.wait_until_done()
    assert len(store.checkpoints(open_files(str(disk)))) == 2


def test_storage_that_fails_gives_the_slot_back_and_is_counted(
    saved: Callable[..., Parts], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "PAUSE_S", 0.01)
    training, vault, _ = saved()
    train_until_durable(training, vault)
    assert vault.saving is not None
    vault.saving.wait_until_done()
    before = vault.saving.news
    whole = store.write_shard

    def fails(*args: Any, **kwargs: Any) -> None:
        raise StorageError("the disk is full")

    monkeypatch.setattr(store, "write_shard", fails)
    for _ in range(6):
        training.step()
        training.snapshots.gate()
        wait_for(lambda: vault.saving is not None and not vault.saving._to_write())
    assert vault.saving.news.failures >= before.failures + saving.TRIES and "full" in vault.saving.news.last_failure
    assert vault.saving.news.durable == before.durable
    monkeypatch.setattr(store, "write_shard", whole)
    train_until_durable(training, vault)
    assert vault.saving.news.committed > before.committed


def test_storage_that_stalls_holds_up_nothing_but_the_next_checkpoint(
    saved: Callable[..., Parts], monkeypatch: pytest.MonkeyPatch
) -> None:
    training, vault, _ = saved()
    train_until_durable(training, vault)
    assert vault.saving is not None
    vault.saving.wait_until_done()
    goes_on, whole = threading.Event(), store.write_shard

    def stalls(*args: Any, **kwargs: Any) -> None:
        goes_on.wait(30.0)
        whole(*args, **kwargs)

    monkeypatch.setattr(store, "write_shard", stalls)
    captured, committed = training.snapshots.tally.captured, vault.saving.news.committed
    for _ in range(10):
        training.step()
        training.snapshots.gate()
        wait_for(lambda: training.snapshots.wish(Ordinal(0, training.steps + 1), 1).room)
    assert training.snapshots.tally.captured >= captured + 9
    assert training.snapshots.tally.saves_postponed > 0 and vault.saving.news.committed == committed
    goes_on.set()
    wait_for(lambda: vault.saving is not None and vault.saving.news.committed > committed)


def test_what_a_former_keeper_has_left_undone_is_done_by_the_next(saved: Callable[..., Parts]) -> None:
    training, vault, disk = saved()
    vault.close()
    while training.snapshots._lifecycle.kept is None:
        training.step()
        training.snapshots.gate()
    assert vault.saving is not None
    spec = vault.saving._spec
    after = Vault(run="r", attempt=1, node="a", folder=training.folder, secret="s", ip="127.0.0.1", save=spec)
    try:
        wait_for(lambda: after.saving is not None and after.saving.news.durable is not None)
    finally:
        after.close()
    assert store.newest(open_files(str(disk))) is not None
