"""A keeper makes snapshots durable: what it writes is the state of that step, and storage that fails stops nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from actors import saver, saving
from actors.ring import Ring
from actors.saving import GivenUp, SaveNews, SaveSpec, Saving
from actors.vault import Vault
from resilient.core.saves import Saves
from resilient.restoring import fetch_stored
from snapshot import store
from snapshot.capture import capture
from snapshot.core.lifecycle import Ordinal
from snapshot.core.stripes import Group
from snapshot.disk import Disk
from snapshot.files import StorageError, open_files
from snapshot.stored import Stored
from snapshot.table import StateTable
from tests.shards import flip
from tests.unit.test_rank_snapshots import Seating, Training, wait_for


class InThread:
    """A keeper's vault, and the saving of its snapshots in a thread, where its storage can be made to fail."""

    def __init__(self, training: Training, spec: SaveSpec) -> None:
        self.vault = Vault(run="r", attempt=1, node="a", folder=training.folder, secret="s", ip="127.0.0.1")
        self.vault.ring(Ring(generation=1, group=Group(nodes=("a",), parity=0), shares={"a": (0,)}))
        self._closing = threading.Event()
        self.saving = Saving(spec, training.folder, closing=self._closing)
        self._idle = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    @property
    def news(self) -> SaveNews:
        return self.saving.news

    def wait_until_done(self) -> None:
        for _ in range(2):  # the turn that is under way may have begun too early
            self._idle.clear()
            wait_for(self._idle.is_set)

    def _run(self) -> None:
        while not self._closing.wait(0.01):
            with contextlib.suppress(GivenUp):
                if self.saving.turn():
                    self._idle.set()

    def close(self) -> None:
        self._closing.set()
        self._thread.join()
        self.vault.close()


Parts = tuple[Training, InThread, Path]


def spec_of(disk: Path, level: int | None = None, keep: int = 2) -> SaveSpec:
    return SaveSpec(run="r", node="a", url=str(disk), keep=keep, level=level, token="0123abcd")


@pytest.fixture
def saved(tmp_path: Path) -> Any:
    """A training whose every second state is made durable."""
    torch.manual_seed(0)
    keepers: list[InThread] = []

    def make(level: int | None = None, keep: int = 2) -> Parts:
        training = Training(tmp_path / "memory", saves=Saves(every_steps=2))
        keepers.append(InThread(training, spec_of(tmp_path / "disk", level, keep)))
        training.ready()
        return training, keepers[-1], tmp_path / "disk"

    yield make
    for keeper in keepers:
        keeper.close()


def train_until_durable(training: Training, keeper: InThread) -> dict[int, StateTable]:
    """Steps until a checkpoint more is there; the states of those that were to be durable."""
    before, states = keeper.news.committed, {}
    for _ in range(40):
        kept = training.snapshots._slots.lifecycle.kept
        state = training.step()
        if state is not None and training.snapshots._slots.lifecycle.kept != kept:
            states[training.steps] = state
        training.snapshots.gate()
        keeper.wait_until_done()
        if keeper.news.committed > before:
            return states
    raise AssertionError(f"no checkpoint in 40 steps: {keeper.news}")


def same(one: StateTable, other: StateTable) -> bool:
    return one.digest() == other.digest()


@pytest.mark.parametrize("level", [None, 1])
def test_what_is_durable_is_the_state_of_its_step(saved: Callable[..., Parts], level: int | None) -> None:
    training, keeper, disk = saved(level)
    states = train_until_durable(training, keeper)
    files = open_files(str(disk))
    newest = store.newest(files)
    assert newest is not None and newest.key.step in states
    assert Stored.open(files, newest).verify() == []
    table = fetch_stored(str(disk), newest.folder)
    assert same(table, states[newest.key.step])
    training.step()
    assert not same(table, capture(training.objects))


def test_only_so_many_are_kept(saved: Callable[..., Parts]) -> None:
    training, keeper, disk = saved(keep=2)
    for _ in range(4):
        train_until_durable(training, keeper)
    keeper.wait_until_done()
    assert len(store.checkpoints(open_files(str(disk)))) == 2


def test_a_checkpoint_that_a_rank_died_over_gives_its_slot_back_and_later_ones_are_written(
    saved: Callable[..., Parts], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "LATE_S", 0.0)
    training, keeper, _ = saved()
    shares = {"a": (0, 1)}
    keeper.vault.ring(Ring(generation=2, group=Group(nodes=("a",), parity=0), shares=shares))
    both, lifecycle = Seating(generation=2, rank=0, world=2), training.snapshots._slots.lifecycle
    torn = Ordinal(0, 100)
    training.snapshots.boundary(torn, training.objects, both, wanted=False)
    training.snapshots.boundary(torn, training.objects, both, wanted=True, durable=True)
    training.snapshots.gate()
    keeper.wait_until_done()
    assert lifecycle.kept == torn and keeper.news.failures == 0, "the other rank may be slow"
    keeper.vault.ring(Ring(generation=3, group=Group(nodes=("a",), parity=0), shares={"a": (0,)}))
    wait_for(lambda: keeper.news.failures == 1)
    assert "a rank has died" in keeper.news.last_failure
    training.snapshots.wish(Ordinal(0, 101), 3)
    assert lifecycle.kept is None


@pytest.mark.parametrize("error", [StorageError("the disk is full"), ZeroDivisionError("full of surprises")])
def test_storage_that_fails_gives_the_slot_back_and_is_counted(
    saved: Callable[..., Parts], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(saving, "LONGEST_PAUSE_S", 0.01)
    training, keeper, _ = saved()
    train_until_durable(training, keeper)
    keeper.wait_until_done()
    before = keeper.news
    whole = store.write_shard

    def fails(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(store, "write_shard", fails)
    for _ in range(6):
        training.step()
        training.snapshots.gate()
        keeper.wait_until_done()
    assert keeper.news.failures >= before.failures + saving.FEW_TRIES and "full" in keeper.news.last_failure
    assert keeper.news.durable == before.durable
    monkeypatch.setattr(store, "write_shard", whole)
    train_until_durable(training, keeper)
    assert keeper.news.committed > before.committed


def test_what_storage_gives_back_changed_is_no_checkpoint_and_the_last_verified_one_stays(
    saved: Callable[..., Parts], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "LONGEST_PAUSE_S", 0.01)
    training, keeper, disk = saved(keep=1)
    train_until_durable(training, keeper)
    files = open_files(str(disk))
    (good,) = store.checkpoints(files)
    rename = Disk.rename

    def flips(disk: Disk, source: Path, target: Path) -> None:
        if target.suffix == ".bin":
            flip(source, source.stat().st_size // 2, 3)
        rename(disk, source, target)

    before = keeper.news
    with monkeypatch.context() as patch:
        patch.setattr(Disk, "rename", flips)
        for _ in range(6):
            training.step()
            training.snapshots.gate()
            keeper.wait_until_done()
    assert keeper.news.unverified >= saving.TRIES and keeper.news.failures >= keeper.news.unverified
    assert "its checksum differs" in keeper.news.last_failure and "chunk" in keeper.news.last_failure
    assert keeper.news.committed == before.committed and [
        each for each in store.checkpoints(files) if each.complete
    ] == [good]
    train_until_durable(training, keeper)
    (newer,) = [each for each in store.checkpoints(files) if each.complete]
    assert newer.key > good.key and Stored.open(files, newer).verify() == []


def test_storage_that_stalls_holds_up_nothing_but_the_next_checkpoint(
    saved: Callable[..., Parts], monkeypatch: pytest.MonkeyPatch
) -> None:
    training, keeper, _ = saved()
    train_until_durable(training, keeper)
    keeper.wait_until_done()
    goes_on, whole = threading.Event(), store.write_shard

    def stalls(*args: Any, **kwargs: Any) -> None:
        goes_on.wait(30.0)
        whole(*args, **kwargs)

    monkeypatch.setattr(store, "write_shard", stalls)
    captured, committed = training.snapshots.tally.captured, keeper.news.committed
    for _ in range(10):
        training.step()
        training.snapshots.gate()
        wait_for(lambda: training.snapshots.wish(Ordinal(0, training.steps + 1), 1).room)
    assert training.snapshots.tally.captured >= captured + 9
    assert training.snapshots.tally.saves_postponed > 0 and keeper.news.committed == committed
    goes_on.set()
    wait_for(lambda: keeper.news.committed > committed)


def test_a_process_of_its_own_does_it_for_a_keeper_and_ends_with_it(tmp_path: Path) -> None:
    """What one that was killed has left undone is done by the next."""
    training = Training(tmp_path / "memory", saves=Saves(every_steps=2))
    spec = spec_of(tmp_path / "disk")
    vault = Vault(run="r", attempt=1, node="a", folder=training.folder, secret="s", ip="127.0.0.1", save=spec)
    assert vault.saving is not None
    first = vault.saving.pid
    try:
        os.kill(first, signal.SIGKILL)
        vault.ring(Ring(generation=1, group=Group(nodes=("a",), parity=0), shares={"a": (0,)}))
        training.ready()
        while training.snapshots._slots.lifecycle.kept is None:
            training.step()
            training.snapshots.gate()
        vault.saving.wait_until_done()
        assert vault.saving.news.durable is not None and vault.saving.pid != first
        assert vault.saving.news.failures == 1 and "another is started" in vault.saving.news.last_failure
        second = vault.saving.pid
    finally:
        vault.close()
    assert not psutil.pid_exists(second)
    assert store.newest(open_files(str(tmp_path / "disk"))) is not None


def test_a_process_that_dies_in_the_middle_of_a_word_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where none can be started for a while: whoever waits for its checkpoints is answered in the end."""
    monkeypatch.setattr(saver, "AGAIN_S", 0.2)
    whole, tries = saver.Saver._start, []

    def start(self: saver.Saver) -> subprocess.Popen[str]:
        tries.append(1)
        if len(tries) == 2:
            raise BlockingIOError("too many processes")
        if len(tries) > 2:
            return whole(self)
        word = (sys.executable, "-c", "print('{\"news\": ', end='')")
        return subprocess.Popen(word, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    monkeypatch.setattr(saver.Saver, "_start", start)
    made = saver.Saver(spec_of(tmp_path / "disk"), tmp_path)
    try:
        made.wait_until_done()
        assert len(tries) == 3 and made.news.failures == 2 and "another is started" in made.news.last_failure
    finally:
        made.close(5.0)


def test_pauses_grow_up_to_a_minute_and_nodes_do_not_come_at_once() -> None:
    pauses = [saving.pause_s(tries, "a") for tries in range(1, saving.TRIES)]
    assert pauses[0] >= 1.5 and max(pauses) <= 75.0 and 200.0 < sum(pauses) < 450.0
    assert len({saving.pause_s(3, node) for node in "abcdef"}) == 6
