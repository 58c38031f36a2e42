"""python -m tests.killing FOLDER: a process that saves is killed before each call to the disk in turn.

A program of its own, because it forks: it has no threads then, pytest may.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

from snapshot.disk import Disk
from snapshot.files import LocalFiles
from tests.disks import Tripwire
from tests.saving import FORMER, STEP, check, check_next, former, points, save


def main(base: Path) -> int:
    former(LocalFiles(base / "former"))
    return points(lambda point: _saved(base, point))


def _saved(base: Path, point: int) -> bool:
    """Whether a child that is killed at this call came to its end."""
    root = base / f"at-{point}"
    shutil.copytree(base / "former", root)
    child = os.fork()
    if child == 0:
        os._exit(_save(root, point))
    _, status = os.waitpid(child, 0)
    done = os.waitstatus_to_exitcode(status) == 0
    assert done or os.waitstatus_to_exitcode(status) == -signal.SIGKILL, status
    check(LocalFiles(root), STEP if done else FORMER[-1])
    if point % 4:
        save(LocalFiles(root))  # the keeper that takes over
        assert check(LocalFiles(root), STEP) == STEP
    else:
        check_next(LocalFiles(root))
    shutil.rmtree(root)
    return done


def _save(root: Path, point: int) -> int:
    def trip(call: int, name: str) -> None:
        if call == point:
            os.kill(os.getpid(), signal.SIGKILL)

    save(LocalFiles(root, Tripwire(Disk(), trip)))
    return 0


if __name__ == "__main__":
    print(main(Path(sys.argv[1])))
