"""Who is dead and who is only slow; and that the dead, should they wake up, change nothing."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

import resilient
from actors import launch
from actors.words import read_words
from tests.integration.loops import Fault, claim, fault, train
from tests.integration.nodes import only_spots, raylet_of
from tests.integration.processes import Watched, disturbances, is_training, left_behind, until

LONG = 300
"""Steps; at the pace that `hold` keeps, long enough for new processes to start and join."""
DETECTION_S = 1.0
PACE_S = 0.3
"""What a step takes at that pace, at least."""


@pytest.fixture(scope="module")
def undisturbed() -> Any:
    return train("alone").local(steps=LONG)


def identical(run: Watched, undisturbed: Any) -> Any:
    """The result, with every row of metrics and nothing left behind."""
    result = run.result()
    assert result.digest == undisturbed.digest, run.news["messages"]
    assert [row["loss"] for row in result.metrics] == [row["loss"] for row in undisturbed.metrics]
    until(lambda: not left_behind(run.name), f"nothing is left: {left_behind(run.name)}", 30)
    return result


def why_lost(result: Any) -> list[str]:
    return [lost["why"] for item in result.recoveries for lost in item["lost"]]


def nobody_was_blamed(run: Watched, result: Any) -> bool:
    return not disturbances(result.recoveries) and not any("gone" in line for line in run.news["messages"])


# Hung


@dataclass(frozen=True, kw_only=True)
class Hang(Fault):
    """Never comes back: computing in Python, or in C with Python's lock held, so that no thread runs any more."""

    in_c: bool

    def now(self) -> None:
        if claim(self.marker):
            while True:
                if self.in_c:
                    ctypes.PyDLL(None).sleep(1000)


@pytest.mark.long
def test_code_that_hangs_in_python_and_in_c_with_the_lock_held(cluster: Any, undisturbed: Any, tmp_path: Path) -> None:
    faults = tuple(
        Hang(marker=str(tmp_path / f"hang-{rank}"), rank=rank, step=15, phase="forward", in_c=rank == 2)
        for rank in (1, 2)
    )
    run = Watched(train("hung", workers=(1, 3)), steps=LONG, hold=str(tmp_path / "go"), faults=faults)
    run.at_step(4, ranks=3)
    pids = [run.pid_of_rank(rank) for rank in (1, 2)]
    run.until_recovered(2, ranks=3)
    assert not any(map(psutil.pid_exists, pids))
    result = identical(run, undisturbed)
    hung = [why for why in why_lost(result) if why.startswith("no progress for 6") and "while computing" in why]
    assert len(hung) == len(why_lost(result)) == 2, result.recoveries


# Slow


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """So many processes that compute all the time, at normal priority."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def validate(steps: tuple[int, ...], seconds: float) -> Callable[[resilient.Run], None]:
    """After these steps the user's code computes something else for so long."""

    def arm(run: resilient.Run) -> None:
        import threading

        import torch

        clip = torch.nn.utils.clip_grad_norm_  # called in every iteration of the body

        def clipping(*args: Any) -> Any:
            if run.committing and run.step in steps:
                with run.pause("validation"):
                    threading.Event().wait(seconds)
            return clip(*args)

        torch.nn.utils.clip_grad_norm_ = clipping

    return arm


@pytest.mark.long
def test_on_a_busy_machine_with_pauses_nobody_is_blamed(cluster: Any, tmp_path: Path) -> None:
    """Twice as many busy processes as cores, the default detection time, a validation that takes longer than that."""
    steps = 40
    alone = train("alone").local(steps=steps)
    cores = os.cpu_count() or 1
    with busy(2 * cores):
        run = Watched(train("slow", workers=3), steps=steps, before=validate((5, 20), 5.0))
        result = run.result(400)
    assert result.digest == alone.digest
    assert nobody_was_blamed(run, result), (result.recoveries, run.news["messages"])


# Controllers


def newest_step(name: str) -> int:
    """Of what the ranks show their keepers: no controller is asked."""
    found = [read_words(path) for path in Path(launch.FOLDER).glob(f"{name}-*/rank-*.words")]
    return max(words[2] for words in found if words is not None)


def test_a_controller_that_was_stopped_blames_nobody(cluster: Any, undisturbed: Any, tmp_path: Path) -> None:
    run = Watched(train("frozen", workers=3, detection_s=DETECTION_S), steps=LONG, hold=str(tmp_path / "go"))
    run.at_step(4, ranks=3)
    pid = ray.get(run.controller.process.remote(), timeout=30)
    os.kill(pid, signal.SIGSTOP)
    try:
        enough = newest_step("frozen") + int(3 * DETECTION_S / PACE_S)
        until(lambda: newest_step("frozen") >= enough, "training goes on without it")
    finally:
        os.kill(pid, signal.SIGCONT)
    run.at_step(enough)
    assert nobody_was_blamed(run, identical(run, undisturbed)), run.news["messages"]


@pytest.mark.long
def test_a_stopped_controller_that_ray_gives_up_never_runs_again(
    cluster: Any, undisturbed: Any, tmp_path: Path
) -> None:
    """Ray starts another one, and has then ended the first, so that what that had begun has no end."""
    run = Watched(train("usurped", workers=(1, 3), detection_s=DETECTION_S), steps=LONG, hold=str(tmp_path / "go"))
    run.at_step(4, ranks=3)
    first = psutil.Process(ray.get(run.controller.process.remote(), timeout=30))
    victim = run.pid_of_rank(1)
    first.suspend()
    try:
        os.kill(victim, signal.SIGKILL)
        ray.kill(run.controller, no_restart=False)
        run.until_said("restarted")
        assert not first.is_running()
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            first.resume()
    run.until_recovered(2, ranks=3)
    result = identical(run, undisturbed)
    assert len(why_lost(result)) == 1, result.recoveries


@pytest.mark.long
def test_a_controller_whose_generation_another_has_made_yields_and_kills_nobody(cluster: Any, tmp_path: Path) -> None:
    """The other one is this test: it takes the number of the next generation, as a controller would."""
    run = Watched(
        train("yielding", workers=(1, 3), detection_s=DETECTION_S), steps=100_000, hold=str(tmp_path / "never")
    )
    try:
        run.at_step(4, ranks=3)
        assert launch.create_key(f"{run.name}/1/generation/{run.news['generation'] + 1:09d}", b"{}")
        pids = [run.pid_of_rank(rank) for rank in range(3)]
        run.signal_rank(1)
        until(lambda: f"{run.name}/1/controller" not in launch.names(run.name), "it has ended")
        assert [psutil.pid_exists(pid) for pid in pids] == [True, False, True]
        with pytest.raises(resilient.RunStopped, match="was created by another controller"):
            run.result()
        until(lambda: not left_behind(run.name), f"they end by their leases: {left_behind(run.name)}", 60)
    finally:
        launch.delete_keys(f"{run.name}/1/")


# Fencing


def stop_in_commit(rank: int, step: int, marker: str) -> Callable[[resilient.Run], None]:
    """This rank is stopped before it commits the snapshot of this step or a later one: a slot stays open."""

    def arm(run: resilient.Run) -> None:
        from snapshot.arena import Slot

        commit = Slot.commit

        def committing(self: Slot) -> None:
            if run.rank == rank and run.step >= step and claim(marker):
                os.kill(os.getpid(), signal.SIGSTOP)
            commit(self)

        Slot.commit = committing  # type: ignore[method-assign]

    return arm


@pytest.mark.long
def test_ranks_stopped_in_an_exchange_and_with_an_open_slot(cluster: Any, undisturbed: Any, tmp_path: Path) -> None:
    """All ranks die afterwards, so that what the second of them had in its slot could be read."""
    snapshot = resilient.Snapshot(every=1, linger_s=60.0)
    run = Watched(
        train("half-way", workers=(1, 3), detection_s=DETECTION_S, snapshot=snapshot),
        steps=LONG,
        hold=str(tmp_path / "go"),
        faults=(fault(tmp_path, 1, 4, "reduce", signal.SIGSTOP),),
        before=stop_in_commit(1, 8, str(tmp_path / "open-slot")),
    )
    run.until(lambda news: sum(len(item["lost"]) for item in news["recoveries"]) >= 2, "both have been found")
    assert all("stopped" in why for item in run.news["recoveries"] for why in [one["why"] for one in item["lost"]])
    run.until_protected(run.news["step"] + 2)
    run.kill_all_ranks()
    run.until(lambda news: any(item["restored_step"] >= 0 for item in news["recoveries"]), "it has gone back")
    identical(run, undisturbed)


@pytest.mark.long
def test_a_host_that_was_stopped_and_goes_on_changes_nothing(cluster: Any, undisturbed: Any, tmp_path: Path) -> None:
    """Raylet, keeper and ranks are stopped, declared dead, replaced, and wake up before Ray has noticed: the node joins
    again, but not what ran there."""
    function = train(
        "undead",
        workers=(1, 3),
        resources={"CPU": 1, "spot": 1},
        detection_s=DETECTION_S,
        snapshot=resilient.Snapshot(every=1, linger_s=0.0),
    )
    with only_spots(cluster, 1, 2, 2) as nodes:
        run = Watched(function, steps=LONG, hold=str(tmp_path / "go"))
        run.at_step(4, ranks=3)
        _, victim = run.ranks()[0]
        (host,) = (node for node in nodes if node.node_id == victim)
        raylet = raylet_of(host)
        processes = [raylet, *raylet.children(recursive=True)]
        training = [process for process in processes if is_training(process.pid)]
        assert len(training) >= 2, processes
        for process in processes:
            process.send_signal(signal.SIGSTOP)
        try:
            run.until_recovered(1, ranks=3)
        finally:
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGCONT)
        _, left = psutil.wait_procs(training, timeout=60)
        assert not left, "they have ended"
        result = identical(run, undisturbed)
    first = disturbances(result.recoveries)[0]
    assert first["kind"] == "node lost" and "silent" in why_lost(result)[0], result.recoveries
