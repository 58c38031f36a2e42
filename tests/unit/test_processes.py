"""A process is known by more than its number, and by a lock where its number does not count."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from actors import processes
from actors.folders import OWNER, earlier_attempts, own, sweep
from actors.processes import (
    end_process,
    hold_lock,
    opened,
    opened_pid,
    place,
    record_process,
    recorded_process,
    send_signal,
    started_at,
    still_runs,
)

OWN_PIDS = ["unshare", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"]), "--pid", "--fork", "--kill-child"]


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield started
    started.kill()
    started.wait()


def test_a_process_is_known_by_its_start_too(tmp_path: Path, process: subprocess.Popen[bytes]) -> None:
    record_process(tmp_path / "a", process.pid)
    assert recorded_process(tmp_path / "a") == process.pid
    (tmp_path / "a").write_text(f"{process.pid} 1 {place()}")
    assert recorded_process(tmp_path / "a") is None
    assert recorded_process(tmp_path / "none") is None


def test_a_record_of_an_older_version_is_read(tmp_path: Path, process: subprocess.Popen[bytes]) -> None:
    (tmp_path / "a").write_text(f"{process.pid} {started_at(process.pid)}")
    assert recorded_process(tmp_path / "a") == process.pid
    assert end_process(tmp_path / "a") and process.wait(10) == -signal.SIGKILL


def test_a_record_of_another_boot_or_namespace_names_no_process_here(
    tmp_path: Path, process: subprocess.Popen[bytes]
) -> None:
    (tmp_path / "a").write_text(f"{process.pid} {started_at(process.pid)} another-boot 4026531836")
    assert not still_runs(tmp_path / "a")
    assert end_process(tmp_path / "a") and process.poll() is None


def test_the_process_is_opened_before_its_start_is_compared(
    tmp_path: Path, process: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between a look and an opening the id could go to another process, which would be killed."""
    record_process(tmp_path / "a", process.pid)
    order = []
    pidfd_open, process_stat = os.pidfd_open, processes.process_stat
    monkeypatch.setattr(os, "pidfd_open", lambda pid: (order.append("open"), pidfd_open(pid))[1])
    monkeypatch.setattr(processes, "process_stat", lambda pid: (order.append("look"), process_stat(pid))[1])
    with opened(tmp_path / "a") as found:
        assert found is not None and found.pid == process.pid
    assert order == ["open", "look"]


def test_a_signal_reaches_no_later_process_of_that_id(process: subprocess.Popen[bytes]) -> None:
    known = psutil.Process(process.pid)
    with opened_pid(process.pid) as found:
        assert found is not None
        process.kill()
        process.wait()
        found.send(signal.SIGKILL)
    send_signal(known, signal.SIGKILL)


def test_a_child_does_not_hold_its_parents_lock(tmp_path: Path) -> None:
    """A worker that outlives a rank must not make it look alive."""
    code = f"""
import os, sys, time
from pathlib import Path
from actors.processes import hold_lock
hold_lock(Path("{tmp_path}/rank-1.process"))
child = os.fork()
if not child:
    os.close(1)
    time.sleep(60)
    os._exit(0)
print(child, flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True, text=True)
    child = psutil.Process(int(done.stdout))
    (tmp_path / "rank-1.process").write_text(f"{child.pid} 1 another-boot 1")
    assert not still_runs(tmp_path / "rank-1.process")
    send_signal(child, signal.SIGKILL)


def test_a_lock_is_taken_once_and_seen(tmp_path: Path) -> None:
    record = tmp_path / "rank-1.process"
    record.write_text("1 1 another-boot 1")
    assert not still_runs(record)
    hold_lock(record)
    hold_lock(record)
    assert still_runs(record) and not end_process(record)


def test_a_keeper_in_another_pid_namespace_keeps_its_folder(tmp_path: Path) -> None:
    """Containers that share a folder don't share ids; a living keeper's snapshots were taken and removed."""
    older, mine = tmp_path / "run-1-aaaa", tmp_path / "run-2-bbbb"
    code = f"""
from pathlib import Path
from actors.folders import own
own(Path("{older}"), 0.0)
print("owned", flush=True)
input()
"""
    command = [*OWN_PIDS, sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as keeper:
        assert keeper.stdin is not None and keeper.stdout is not None
        assert keeper.stdout.readline() == "owned\n"
        os.utime(older / OWNER, (0, 0))
        own(mine, 0.0)
        assert still_runs(older / OWNER)
        assert earlier_attempts(mine, "run", 2, "bbbb") == ()
        assert earlier_attempts(mine, "run", 2, "aaaa") == (), "it can't be ended from here"
        with pytest.raises(OSError, match="lives in another pid namespace"):
            own(older, 0.0)
        sweep(tmp_path, (mine,))
        assert older.exists()
        keeper.communicate("")
    assert earlier_attempts(mine, "run", 2, "bbbb") == (older,)
