"""Clocks that are set by minutes, forward and back, while a run goes on: on nodes, and on the controller's.

Each node's Python reads a wall clock of its own, which a file says to be wrong. Clocks that nobody sets are left alone.
(libfaketime would do that for all programs, but its waits fail under Python.)
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import resilient
from tests.integration.loops import train
from tests.integration.nodes import add_node, another_cluster
from tests.integration.processes import Watched
from tests.integration.test_detection import identical, nobody_was_blamed

pytestmark = pytest.mark.long

STEPS = 90
"""Half a minute, at the pace that `hold` keeps."""


CUSTOMIZED = """
import os, time
wrong_by, right, right_ns = os.environ["CLOCK_FILE"], time.time, time.time_ns
def off():
    with open(wrong_by) as file:
        return 60 * int(file.read())
time.time = lambda: right() + off()
time.time_ns = lambda: right_ns() + off() * 10**9
"""
"""What Python runs as it starts, in the processes of these nodes."""


class Clocks:
    """One file per node says by how much its clock is wrong."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def environment(self, node: str) -> dict[str, str]:
        self.set(node, 0)
        (self._folder / "python").mkdir(exist_ok=True)
        (self._folder / "python" / "sitecustomize.py").write_text(CUSTOMIZED)
        paths = os.pathsep.join([str(self._folder / "python"), os.environ.get("PYTHONPATH", "")])
        return {"PYTHONPATH": paths, "CLOCK_FILE": str(self._folder / node)}

    def set(self, node: str, minutes: int) -> None:
        fresh = self._folder / f".{node}"
        fresh.write_text(str(minutes))
        fresh.rename(self._folder / node)


@pytest.fixture
def clocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Clocks]:
    """A head, where the controller is, and two nodes with room for a rank each."""
    found = Clocks(tmp_path)

    with monkeypatch.context() as patched:

        def as_of(node: str) -> None:
            for name, value in found.environment(node).items():
                patched.setenv(name, value)

        as_of("head")
        with another_cluster() as cluster:
            for node in ("one", "two"):
                as_of(node)
                add_node(cluster, num_cpus=1, object_store_memory=80 << 20)
            yield found


def test_clocks_that_jump_kill_nobody_and_lose_no_checkpoint(clocks: Clocks, tmp_path: Path) -> None:
    undisturbed: Any = train("alone").local(steps=STEPS)
    url = str(tmp_path / "checkpoints")
    kept = resilient.Checkpoint(url, every=20, keep=2)
    run = Watched(
        train("jumps", workers=2, snapshot=resilient.Snapshot(every=1), checkpoint=kept),
        steps=STEPS,
        hold=str(tmp_path / "go"),
    )
    run.at_step(5, ranks=2)
    jumps = ((10, "one", 10), (20, "head", 15), (30, "two", -10), (40, "head", -20), (50, "one", -5))
    for step, node, minutes in jumps:
        clocks.set(node, minutes)
        run.at_step(step)
    result = identical(run, undisturbed)
    assert nobody_was_blamed(run, result), (result.recoveries, run.news["messages"])
    assert result.checkpoints["committed"] >= 3, result.checkpoints
    assert len(os.listdir(url)) == 2
