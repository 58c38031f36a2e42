"""The keeper as an object: what it holds on to of ranks that come and go."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from actors import keeper as module
from actors.keeper import Keeper, KeeperSpec, Pulse

LIMIT_S = 10.0
ROOT = Path(__file__).parents[2]


class Controller:
    """Takes in heartbeats; the remote call's form is all that is Ray's here."""

    def __init__(self) -> None:
        self.pulses: tuple[Pulse, ...] = ()
        self.news = threading.Event()
        self.beat = SimpleNamespace(remote=self._beat)

    def _beat(self, _node: str, _incarnation: int, pulses: tuple[Pulse, ...], _vault: Any, _saved: Any) -> None:
        self.pulses = pulses
        self.news.set()

    def until_all_ended(self) -> None:
        for _ in range(int(LIMIT_S / 0.05)):
            self.news.wait(0.05)
            self.news.clear()
            if self.pulses and not any(pulse.alive for pulse in self.pulses):
                return
        raise AssertionError(self.pulses)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def hold_and_lose_ranks(folder: str) -> None:
    module.raise_priority = lambda: None  # type: ignore[assignment]
    controller = Controller()
    spec = KeeperSpec(
        key="run/1", node="node", folder=folder, secret="s", incarnation=1, beat_s=0.5, lease_s=3600.0
    )  # fmt: skip
    keeper = Keeper(spec, controller)
    before = descriptors()
    for member in range(1, 9):
        with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as rank:
            keeper.watch(member, rank.pid)
            keeper.kill(member)
            rank.wait(LIMIT_S)
        controller.until_all_ended()
        keeper.kill(member)  # of what has ended nothing else is hit
    assert [pulse.member for pulse in controller.pulses] == list(range(1, 9))
    keeper.renew(("127.0.0.1", 1), tuple(range(1, 8)))
    assert [pulse.member for pulse in keeper._pulses()] == [8], "what is on record is not shown for ever"
    assert [path.name for path in Path(folder).glob("rank-*")] == ["rank-8.process"]
    assert descriptors() <= before, (descriptors(), before)


def test_no_descriptor_is_kept_of_ranks_that_have_ended(tmp_path: Path) -> None:
    """One was: after a thousand replacements a node's keeper could open no more files.

    In a process of its own: a keeper watches for as long as its process lives.
    """
    body = f"from tests.unit.test_keeper import hold_and_lose_ranks; hold_and_lose_ranks({str(tmp_path / 'run')!r})"
    done = subprocess.run((sys.executable, "-c", body), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
