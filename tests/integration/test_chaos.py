"""The commands from another process: what they show of a run, and that it survives what they do to it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.integration.loops import train
from tests.integration.processes import Watched
from tests.integration.test_snapshots import EVERY_STEP

STEPS = 120


def command(cluster: Any, *arguments: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-c", "from resilient.cli import main; main()", *arguments]
    environment = {**os.environ, "RAY_ADDRESS": cluster.address}
    return subprocess.run(program, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_nothing_is_running(cluster: Any) -> None:
    nothing = command(cluster, "status", "no-such-run")
    assert (nothing.returncode, nothing.stdout) == (1, "no run 'no-such-run' is going on\n"), nothing.stderr


@pytest.mark.long
def test_a_run_is_shown_and_survives_chaos(cluster: Any, tmp_path: Path) -> None:
    undisturbed = train("alone").local(steps=STEPS)
    run = Watched(train("broken", workers=(1, 3), snapshot=EVERY_STEP), steps=STEPS, hold=str(tmp_path / "go"))
    run.at_step(4, ranks=3)
    run.until_protected(4)
    shown = command(cluster, "status", "broken", "--json")
    assert shown.returncode == 0, shown.stderr
    (view,) = json.loads(shown.stdout)["runs"]
    assert (view["run"], view["attempt"], len(view["ranks"])) == ("broken", 1, 3) and view["step"] >= 4
    assert {seat["state"] for seat in view["ranks"]} <= {"computing", "waiting", "starting"}, view
    assert view["snapshots"]["protected"] >= 4 and view["checkpoints"] == {}

    done = command(
        cluster,
        *("chaos", "broken", "--kind", "kill,cut,corrupt,keeper,controller", "--every", "2s", "--for", "10s"),
        *("--seed", "1", "--yes-break-it"),
    )
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 6, done
    run.until(lambda news: news["ranks"] >= 1, "it has recovered")
    result = run.result()
    assert result.digest == undisturbed.digest, (done.stdout, run.news["messages"])
