"""A save that is cut off at every call to the disk: by the power, by SIGKILL, by errors."""

import copy
import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from snapshot.core.names import is_temporary
from snapshot.files import LocalFiles, StorageError
from snapshot.slot import chunk_sums
from snapshot.store import write_shard
from tests.disks import ModelDisk, PowerCut, Tripwire
from tests.saving import FORMER, STEP, check, check_next, former, points, save
from tests.shards import state_of

ROOT = Path("/checkpoints/gpt")
SEEDS = 3


SAVED = ModelDisk()
former(LocalFiles(ROOT, SAVED))


def fresh() -> ModelDisk:
    return copy.deepcopy(SAVED)


@pytest.mark.parametrize("compression", [None, 1])
def test_whenever_the_power_goes_a_whole_checkpoint_is_left(compression: int | None) -> None:
    def cut(point: int) -> bool:
        disk, done = fresh(), False

        def trip(call: int, name: str) -> None:
            if call == point:
                disk.dead = True

        try:
            save(LocalFiles(ROOT, Tripwire(disk, trip)), compression=compression)
            done = True
        except PowerCut:
            pass
        for seed in range(SEEDS):
            after = disk.after_power_cut(1000 * point + seed)
            check(LocalFiles(ROOT, after), STEP if done else FORMER[-1])
            if seed == 0:
                save(LocalFiles(ROOT, after))
                assert check(LocalFiles(ROOT, after), STEP) == STEP
            if seed == 1:
                check_next(LocalFiles(ROOT, after))
        return done

    assert points(cut) > 60


def test_the_first_checkpoint_is_there_when_its_save_has_returned() -> None:
    """Nothing above it was durable before."""
    for seed in range(50):
        disk = ModelDisk()
        save(LocalFiles(ROOT, disk))
        assert check(LocalFiles(ROOT, disk.after_power_cut(seed)), STEP) == STEP


def test_a_manifest_that_only_looked_durable_is_made_so() -> None:
    """Its writer dies, not the machine; then, after the next keeper said that it is saved, the power goes."""

    def cut(point: int) -> bool:
        disk = fresh()

        def trip(call: int, name: str) -> None:
            if call >= point:
                raise PowerCut

        try:
            save(LocalFiles(ROOT, Tripwire(disk, trip)))
            return True
        except PowerCut:
            pass
        disk.open_files.clear()
        save(LocalFiles(ROOT, disk))
        for seed in range(SEEDS):
            assert check(LocalFiles(ROOT, disk.after_power_cut(1000 * point + seed)), STEP) == STEP
        return False

    assert points(cut) > 60


@pytest.mark.parametrize(
    ("code", "lasting"),
    [(errno.ENOSPC, False), (errno.EIO, False), (errno.EACCES, False), (errno.EIO, True)],
)
def test_an_error_at_any_call_leaves_the_former_checkpoint(code: int, lasting: bool) -> None:
    def fail(point: int) -> bool:
        disk, failed = fresh(), list[str]()

        def trip(call: int, name: str) -> None:
            if call == point or (lasting and call > point):
                failed.append(name)
                raise OSError(code, os.strerror(code))

        try:
            save(LocalFiles(ROOT, Tripwire(disk, trip)))
            # A manifest that can't be read keeps nothing from being saved; it only isn't counted.
            assert lasting is False or not failed, failed
        except StorageError as error:
            assert isinstance(error.__cause__, OSError) and str(ROOT) in str(error)
            assert os.strerror(code) in str(error)
        check(LocalFiles(ROOT, disk), FORMER[-1])
        assert sum(map(is_temporary, names(disk))) <= lasting
        if point % 2:
            save(LocalFiles(ROOT, disk))
            assert check(LocalFiles(ROOT, disk), STEP) == STEP
        else:
            check_next(LocalFiles(ROOT, disk))
        return not failed

    assert points(fail) > 60


def names(disk: ModelDisk) -> list[str]:
    files = LocalFiles(ROOT, disk)
    return [name for folder in files.names() for name in files.names(folder)]


def test_a_killed_process_leaves_a_whole_checkpoint() -> None:
    # In memory, where a sync costs nothing: what a process has written outlives it anyway.
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        done = subprocess.run(
            [sys.executable, "-m", "tests.killing", folder],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 60


def test_giving_up_leaves_nothing(tmp_path: Path) -> None:
    class Enough(Exception):
        pass

    def give_up() -> None:
        raise Enough

    files, state = LocalFiles(tmp_path), state_of()
    head, payload = state.head(0), state.payload(0)
    with pytest.raises(Enough):
        write_shard(files, token=state.token, head=head, payload=payload, sums=chunk_sums(payload, head), pause=give_up)
    assert files.names(state.folder) == []
