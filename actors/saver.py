"""The process that makes a node's snapshots durable, at the lowest priority, and its keeper's end of it.

    keeper --a line: the SaveSpec, then questions--> saver --lines: what has come of it--> keeper

Not a thread of the keeper: one of low priority that holds Python's lock when a busy machine takes its core away keeps
all other threads waiting. With six busy processes on two cores that was 1.5 s, longer than a keeper may be silent.
It also keeps file systems' code, and disks that stall, out of the keeper. It ends with its keeper.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

from actors.priority import lowest_priority
from actors.saving import GivenUp, SaveNews, SaveSpec, Saving
from snapshot.fields import key_fields, key_from

LOOK_S = 0.2
TELL_S = 1.0
AGAIN_S = 2.0
"""Before one that has died is replaced."""


class Saver:
    """The keeper's end. Any thread may call."""

    def __init__(self, spec: SaveSpec, folder: Path) -> None:
        self._spec, self._folder = spec, folder
        self._told = self._before = SaveNews()
        self._asked = self._answered = 0
        self._changed = threading.Condition()
        self._closing = False
        self._process = self._start()
        threading.Thread(target=self._listen, name="saver", daemon=True).start()

    @property
    def news(self) -> SaveNews:
        """Of all processes that there were, one after another."""
        with self._changed:
            told, before = self._told, self._before
        return replace(
            told,
            durable=told.durable or before.durable,
            committed=told.committed + before.committed,
            failures=told.failures + before.failures,
            unverified=told.unverified + before.unverified,
            last_failure=told.last_failure or before.last_failure,
            stored_bytes=told.stored_bytes or before.stored_bytes,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_until_done(self) -> None:
        """Until all that is there now to be made durable is, or has been given up."""
        with self._changed:
            self._asked += 1
            asked = self._asked
            self._ask()
            while self._answered < asked and not self._closing:
                self._changed.wait()

    def close(self, limit_s: float) -> None:
        """What is half written is left to the next."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._process.kill()
        self._process.wait(limit_s)
        _close(self._process.stdin)

    def _start(self) -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OPENBLAS_NUM_THREADS": "1"}
        process = subprocess.Popen(
            (sys.executable, "-m", "actors.saver", str(self._folder)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert process.stdin is not None
        process.stdin.write(json.dumps(asdict(self._spec)) + "\n")
        process.stdin.flush()
        return process

    def _ask(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # it has died; the next one is asked again
            self._process.stdin.write(f"{self._asked}\n")
            self._process.stdin.flush()

    def _listen(self) -> None:
        while True:
            assert self._process.stdout is not None
            with contextlib.suppress(ValueError, KeyError, TypeError):  # killed in the middle of a line
                for line in self._process.stdout:
                    self._hear(json.loads(line))
            self._process.kill()
            self._process.wait()
            _close(self._process.stdout)
            _close(self._process.stdin)
            died = f"the process that writes checkpoints has ended ({self._process.returncode}), another is started"
            while not self._closing and not self._replaced(died):
                pass
            if self._closing:
                return

    def _replaced(self, died: str) -> bool:
        """Whether another process could be started, after a while."""
        for _ in range(int(AGAIN_S / LOOK_S)):
            if self._closing:
                return False
            time.sleep(LOOK_S)
        with self._changed:
            if self._closing:
                return False
            self._before = replace(self.news, failures=self.news.failures + 1, last_failure=died)
            self._told = SaveNews()
            try:
                self._process = self._start()
            except OSError as error:  # no memory, or too many processes, for a while
                self._before = replace(self._before, last_failure=f"{died}; but: {error}")
                return False
            self._ask()
            return True

    def _hear(self, told: dict[str, Any]) -> None:
        fields = told["news"]
        durable = None if fields["durable"] is None else key_from(fields["durable"])
        with self._changed:
            self._told = SaveNews(**{**fields, "durable": durable})
            self._answered = max(self._answered, told["answered"])
            self._changed.notify_all()


def _close(pipe: IO[str] | None) -> None:
    assert pipe is not None
    with contextlib.suppress(OSError):  # nobody reads any more what was still to be written
        pipe.close()


# The process


def main() -> None:
    lowest_priority()
    spec = SaveSpec(**json.loads(sys.stdin.readline()))
    asked = [0]
    threading.Thread(target=_hear_questions, args=(asked,), daemon=True).start()
    saving = Saving(spec, Path(sys.argv[1]), closing=threading.Event())
    told, told_at, answered = saving.news, 0.0, 0
    while True:
        question = asked[0]
        try:
            idle = saving.turn()
        except GivenUp:
            return
        if idle:
            answered = max(answered, question)
        now = time.monotonic()
        if saving.news != told or idle or now - told_at > TELL_S:
            told, told_at = saving.news, now
            durable = None if told.durable is None else key_fields(told.durable)
            print(json.dumps({"news": {**asdict(told), "durable": durable}, "answered": answered}), flush=True)
        time.sleep(LOOK_S)


def _hear_questions(asked: list[int]) -> None:
    for line in sys.stdin:
        asked[0] = int(line)
    os._exit(0)  # the keeper has ended


if __name__ == "__main__":
    main()
