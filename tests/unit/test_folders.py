"""Whose a run's folder is: what is swept, and what is taken over."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.folders import OWNER, earlier_attempts, own, record_process, recorded_process, still_owned, sweep


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield started
    started.kill()
    started.wait()


def abandoned(folder: Path, linger_s: float = 0.0) -> Path:
    """A folder whose keeper has ended long ago."""
    own(folder, linger_s)
    (folder / OWNER).write_text("1 0")
    os.utime(folder / OWNER, (0, 0))
    return folder


def test_a_process_is_known_by_its_start_too(tmp_path: Path, process: subprocess.Popen[bytes]) -> None:
    record_process(tmp_path / "a", process.pid)
    assert recorded_process(tmp_path / "a") == process.pid
    (tmp_path / "a").write_text(f"{process.pid} 1")
    assert recorded_process(tmp_path / "a") is None
    assert recorded_process(tmp_path / "none") is None


def test_only_what_nobody_owns_or_needs_is_swept(tmp_path: Path, process: subprocess.Popen[bytes]) -> None:
    gone, kept = abandoned(tmp_path / "gone-1-aa"), abandoned(tmp_path / "kept-1-aa")
    lingers = abandoned(tmp_path / "lingers-1-aa", linger_s=1e12)
    orphaned = abandoned(tmp_path / "orphaned-1-aa")
    record_process(orphaned / "rank-1.process", process.pid)
    own(tmp_path / "mine-1-aa", 0.0)
    sweep(tmp_path, (kept,))
    assert not gone.exists()
    assert all(folder.exists() for folder in (kept, lingers, orphaned, tmp_path / "mine-1-aa"))


def test_lingering_counts_from_the_keepers_end(tmp_path: Path) -> None:
    folder = abandoned(tmp_path / "run-1-aa", linger_s=600.0)
    still_owned(folder)
    sweep(tmp_path, ())
    assert folder.exists()
    still_owned(tmp_path / "none")


def test_earlier_attempts_are_taken_over_and_their_processes_ended(
    tmp_path: Path, process: subprocess.Popen[bytes]
) -> None:
    mine = abandoned(tmp_path / "run-1-aaaa", linger_s=600.0)
    record_process(mine / "rank-1.process", process.pid)
    abandoned(tmp_path / "other-1-aaaa")
    own(tmp_path / "run-2-bbbb", 600.0)  # of a node that lives
    taken = earlier_attempts(tmp_path / "run-3-aaaa", "run", 3, "aaaaaaaa")
    assert taken == (mine,)
    assert process.wait(10) == -9


def test_a_folder_that_is_taken_over_has_lost_its_former_owner(
    tmp_path: Path, process: subprocess.Popen[bytes]
) -> None:
    """A keeper that had been cut off removed the folder of the one that had taken its place, when its lease ended."""
    record_process(tmp_path / OWNER, process.pid)
    own(tmp_path, 0.0)
    assert process.wait(10) == -9
    assert recorded_process(tmp_path / OWNER) == os.getpid()
    own(tmp_path, 0.0)


def test_what_may_still_be_taken_over_is_not_swept_in_passing(tmp_path: Path) -> None:
    folder = abandoned(tmp_path / "run-1-aa")
    still_owned(folder)
    sweep(tmp_path, (), at_least_s=60.0)
    assert folder.exists()
    sweep(tmp_path, ())
    assert not folder.exists()
