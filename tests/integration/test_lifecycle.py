"""Who ends when: controllers, drivers, users' exceptions, Ctrl-C; and nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

import resilient
from actors import launch
from tests.integration.loops import body, train
from tests.integration.processes import Watched, drivers, end_what_goes_on, left_behind, until

LONG = 150


def test_controller_killed_in_mid_step_and_a_rank_after_that(cluster: Any, tmp_path: Path) -> None:
    undisturbed = train("alone").local(steps=LONG)
    run = Watched(train("headless", workers=(1, 3)), steps=LONG, hold=str(tmp_path / "go"))
    run.at_step(4, ranks=3)
    pid = run.pid_of_rank(1)
    run.kill_controller()
    os.kill(pid, signal.SIGKILL)
    run.until_said("restarted")
    run.until(lambda news: news["generation"] >= 2, "the death is handled")
    result = run.result()
    assert result.digest == undisturbed.digest
    assert [row["loss"] for row in result.metrics] == [row["loss"] for row in undisturbed.metrics]


@pytest.mark.long
def test_a_function_that_carries_300_mb_outlives_controller_rank_and_node(cluster: Any, tmp_path: Path) -> None:
    undisturbed = train("alone").local(steps=LONG)
    run = Watched(train("heavy", 300 << 20, workers=2), steps=LONG, hold=str(tmp_path / "go"))
    run.at_step(4, ranks=2)
    for rank in range(2):
        pid = run.pid_of_rank(rank)
        run.kill_controller()
        os.kill(pid, signal.SIGKILL)
        run.until_recovered(rank + 1, ranks=2)
    assert run.result().digest == undisturbed.digest
    assert until(lambda: not left_behind("heavy"), "nothing is left", 15)
    assert not launch.list_keys("heavy/")


@pytest.mark.long
def test_training_goes_on_without_a_controller(cluster: Any, tmp_path: Path) -> None:
    """No step waits for it: as long as nobody dies, ranks commit while it is gone."""
    undisturbed = train("alone").local(steps=LONG)
    run = Watched(train("alone-together", workers=2), steps=LONG, hold=str(tmp_path / "go"))
    run.at_step(3, ranks=2)
    run.kill_controller()
    result = run.result()
    assert result.digest == undisturbed.digest and not result.recoveries


def test_an_exception_in_the_users_code_stops_the_run_with_its_traceback(cluster: Any) -> None:
    def breaks(run: resilient.Run) -> None:
        if run.rank == 1 and run.step == 2:
            raise KeyError("no such feature")

    def main(run: resilient.Run) -> Any:
        from tests.integration.loops import body

        class Breaking(list[Any]):
            pass

        import torch

        torch.nn.utils.clip_grad_norm_ = lambda *_: breaks(run)  # called in every iteration of the body
        return body(run, steps=8)

    run = resilient.train(name="raises", workers=2)(main)
    with pytest.raises(resilient.TrainingFailed, match=r"(?s)rank 1 .* in step 2.*in breaks.*KeyError: 'no such feat"):
        run()
    assert until(lambda: not left_behind("raises"), "nothing is left", 15)


DRIVER = """
    import signal, sys, ray
    signal.signal(signal.SIGINT, signal.default_int_handler)  # where tests run under nohup it is ignored
    ray.init(address=sys.argv[1], log_to_driver=False)
    from tests.integration.loops import train
    try:
        train(sys.argv[2], workers=2, detection_s=1.0)(steps=100000, hold="/nonexistent/never")
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        sys.exit(42)
"""


def driver(cluster: Any, name: str, script: str = DRIVER) -> subprocess.Popen[str]:
    """A driver in a process of its own, training on and on."""
    home = Path(__file__).resolve().parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), cluster.address, name],
        cwd=home,
        env={**os.environ, "PYTHONPATH": str(home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    drivers.append(process)
    until(lambda: len([entry for entry in left_behind(name) if "/rank/" in entry]) == 2, "ranks have started")
    return process


def test_a_killed_drivers_run_ends_by_its_lease(cluster: Any) -> None:
    process = driver(cluster, "orphaned")
    process.kill()
    process.communicate(timeout=10)
    until(lambda: not left_behind("orphaned"), f"all has ended: {left_behind('orphaned')}", 60)


def test_ctrl_c_ends_everything_before_the_driver_ends(cluster: Any) -> None:
    process = driver(cluster, "interrupted")
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=40)
    assert process.returncode == 42 and "interrupted" in out
    assert not left_behind("interrupted")


def test_sigterm_ends_everything_also_where_ctrl_c_is_ignored(cluster: Any) -> None:
    """As under nohup, or in the background of a shell without job control."""
    process = driver(cluster, "terminated", DRIVER.replace("signal.default_int_handler", "signal.SIG_IGN"))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=40)
    assert process.returncode != 0
    assert not left_behind("terminated")


@pytest.mark.long
def test_a_second_run_of_the_same_name_is_refused_while_the_first_lives(cluster: Any, tmp_path: Path) -> None:
    run = Watched(train("twice", workers=1), steps=LONG, hold=str(tmp_path / "go"))
    run.at_step(1)
    with pytest.raises(resilient.ResilientError, match="'twice' is going on"):
        train("twice", workers=1)(steps=1)
    assert run.result().step == LONG


@pytest.mark.long
def test_nothing_leaks_into_the_driver(cluster: Any) -> None:
    def held() -> tuple[int, int]:
        threads = [t for t in threading.enumerate() if t.daemon and "ray" not in t.name.lower()]
        return len(os.listdir("/proc/self/fd")), len(threads)

    train("leaks", workers=1)(steps=1)
    before = held()
    for _ in range(2):
        train("leaks", workers=1)(steps=1)
    until(lambda: held()[1] <= before[1], f"threads have ended: {threading.enumerate()}", 10)
    assert held()[0] <= before[0] + 2
    assert not left_behind("leaks")
    assert ray.is_initialized()


def crashing(run: resilient.Run, **kwargs: Any) -> Any:
    """What a driver would raise, at step 3, on whatever rank computes micro-batch 0."""

    def broken_device(now: resilient.Run) -> None:
        if now.step == 3 and now.rank == 0:
            raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    return body(run, **kwargs, in_step=broken_device)


def test_a_machine_error_that_comes_back_on_other_nodes_ends_the_run(cluster: Any) -> None:
    with pytest.raises(resilient.RunLost) as caught:
        resilient.train(name="crash-loop", workers=(1, 3))(crashing)(steps=50)
    assert "at step 3" in str(caught.value) and "device-side assert" in str(caught.value)
    assert not left_behind("crash-loop")


@pytest.mark.long
def test_more_failures_than_allowed_end_the_run(cluster: Any, tmp_path: Path) -> None:
    run = Watched(train("budget", workers=(1, 2), max_failures=0), steps=500, hold=str(tmp_path / "go"))
    run.at_step(3, ranks=2)
    run.signal_rank(1)
    with pytest.raises(resilient.RunLost, match=r"max_failures=0"):
        run.result()
    assert left_behind("budget") == []


def test_what_a_test_leaves_is_ended_and_named(cluster: Any) -> None:
    driver(cluster, "left")
    assert end_what_goes_on(0.0) == ["left"]
    assert not drivers and not [entry for entry in left_behind("left") if "/rank/" in entry]
