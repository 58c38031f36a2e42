"""Whose a run's folder is: what is swept, and what is taken over."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.folders import OWNER, earlier_attempts, home, leftovers, make_private, own, still_owned, sweep
from actors.processes import place, record_process, recorded_process, started_at


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


# Strangers and neighbours

NOBODY = 65534


def as_another_user(code: str) -> None:
    """In a process of user `nobody`, if this is root's. Otherwise there is one user only, and the permission bits are
    all that is tested."""
    switch = f"import os; os.getuid() or (os.setgid({NOBODY}), os.setuid({NOBODY}))"
    imports = "from pathlib import Path; from actors.folders import home, own"
    subprocess.run([sys.executable, "-c", f"{imports}; {switch}\n{code}"], check=True)


@pytest.fixture
def shared() -> Iterator[Path]:
    """A place that all users may write to, as /dev/shm is."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o1777)
        yield Path(folder)


def test_two_users_of_a_machine_have_folders_of_their_own(shared: Path) -> None:
    as_another_user(f"own(home('{shared}') / 'gpt-1-aaaa', 0.0)")
    own(home(str(shared)) / "gpt-2-aaaa", 0.0)
    for folder in shared.iterdir():
        assert folder.name == f"resilient-{folder.stat().st_uid}" and folder.stat().st_mode & 0o777 == 0o700
    assert len(list(shared.iterdir())) == (2 if os.geteuid() == 0 else 1)


def test_a_folder_that_was_planted_is_refused(shared: Path, process: subprocess.Popen[bytes]) -> None:
    """What is on record there is killed: whoever could write it chose whom."""
    mine = home(str(shared))
    record = f"{process.pid} {started_at(process.pid)} {place()}"
    as_another_user(f"""
run = Path('{mine}') / 'gpt-1-aaaa'
run.mkdir(mode=0o777, parents=True)
(run / 'rank-1.process').write_text('{record}')
(run / 'keeper.process').write_text('1 1')
(run / 'keeper.lingers').write_text('0')
run.parent.chmod(0o777)
""")
    with pytest.raises(PermissionError, match=r"belongs to user|is open to others .*remove it, or choose"):
        own(mine / "gpt-2-aaaa", 0.0)
    assert earlier_attempts(mine / "gpt-2-aaaa", "gpt", 2, "aaaa") == ()
    assert not leftovers(mine) and not sweep(mine) and (mine / "gpt-1-aaaa").exists()
    assert process.poll() is None


def test_a_link_or_an_open_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PermissionError, match="is a link"):
        own(tmp_path / "link" / "gpt-1-aaaa", 0.0)
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o750)
    with pytest.raises(PermissionError, match=r"is open to others \(mode 0750\)"):
        make_private(tmp_path / "open")
    (tmp_path / "file").touch()
    with pytest.raises(PermissionError, match="is no folder"):
        make_private(tmp_path / "file")


def test_only_runs_that_are_ones_own_are_taken_over(tmp_path: Path, process: subprocess.Popen[bytes]) -> None:
    abandoned(tmp_path / "elsewhere" / "gpt-1-aaaa")
    record_process(tmp_path / "elsewhere" / "gpt-1-aaaa" / "rank-1.process", process.pid)
    mine = home(str(tmp_path))
    own(mine / "gpt-2-aaaa", 0.0)
    (mine / "gpt-1-aaaa").symlink_to(tmp_path / "elsewhere" / "gpt-1-aaaa")
    assert earlier_attempts(mine / "gpt-2-aaaa", "gpt", 2, "aaaa") == ()
    assert not sweep(mine, (mine / "gpt-2-aaaa",)) and process.poll() is None


def test_what_an_older_version_left_is_taken_over_and_swept(tmp_path: Path) -> None:
    older = abandoned(tmp_path / "resilient" / "gpt-1-aaaa")
    (tmp_path / "resilient").chmod(0o755)
    mine = home(str(tmp_path)) / "gpt-2-aaaa"
    own(mine, 0.0)
    assert earlier_attempts(mine, "gpt", 2, "aaaa") == (older,)
    (tmp_path / "resilient").chmod(0o777)
    assert earlier_attempts(mine, "gpt", 2, "aaaa") == ()
    (tmp_path / "resilient").chmod(0o755)
    (swept,) = sweep(mine.parent, (mine,))
    assert swept.folder == older and not older.exists()
