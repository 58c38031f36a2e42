"""The demo: a small GPT is trained on a cluster that things happen to, and alone; are the bits the same?

a local cluster of 4 nodes      |  one process
a rank is killed                |
a whole node disappears         |  nothing happens
a new node joins                |
digest of the state             =  digest of the state
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .core.bubbles import in_words
from .demo_alone import __name__ as ALONE
from .demo_chaos import Chaos, Pace, RunEnded, Watch
from .demo_cluster import LocalCluster, remove_files
from .demo_picture import draw
from .demo_result import Outcome, survived_all, versions
from .demo_screen import Screen, table, verdict
from .errors import ResilientError
from .result import Result

NODES = 4
STEP_S = 0.25
FEWEST_STEPS = 60
"""With fewer there is no room for all that happens."""
ON_CLUSTER, ALONE_LABEL = "on the cluster", "undisturbed, one process"


def run_demo(*, out: Path, steps: int, seed: int, screen: Screen, pipeline: bool = False) -> Outcome:
    """Run it, write result.json and loss.png into `out`, and leave nothing else behind.

    pipeline: each rank holds some of the model's layers, and a rank that dies is the only one that holds them.

    Raises ValueError for too few steps, ResilientError when a run fails.
    """
    if steps < FEWEST_STEPS:
        raise ValueError(f"steps={steps}: the demo needs at least {FEWEST_STEPS}, so that all can happen in time")
    began_at = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    with Undisturbed(steps, screen, pipeline) as undisturbed, ray_quiet(out / "ray.log"):
        result, chaos = _on_cluster(model(pipeline), steps, seed, screen)
        screen.say("the run on the cluster has ended; waiting for the one that nothing happens to")
        alone = undisturbed.outcome()
    outcome = Outcome(
        identical=result.digest == alone["digest"],
        survived_all=survived_all(chaos.events, result.recoveries),
        steps=result.step,
        digest=result.digest,
        digest_undisturbed=alone["digest"],
        parameters=alone["parameters"],
        events=chaos.events,
        recoveries=list(result.recoveries),
        seed=seed,
        seconds=round(time.monotonic() - began_at, 1),
        versions=versions(),
        bubbles=result.bubbles,
        metrics=list(result.metrics),
        metrics_undisturbed=alone["metrics"],
    )
    (out / "result.json").write_text(json.dumps(outcome.to_json(), indent=1) + "\n")
    draw(outcome, out / "loss.png")
    return outcome


@contextlib.contextmanager
def ray_quiet(path: Path) -> Iterator[None]:
    """Ray prints a long account of every death that the demo brings about: into a file, not between its lines."""
    with path.open("w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        yield


def model(pipeline: bool) -> Any:
    """What is trained."""
    if pipeline:
        from .demo_pipeline_model import main as in_stages

        return in_stages
    from .demo_model import main

    return main


def _on_cluster(main: Any, steps: int, seed: int, screen: Screen) -> tuple[Result, Chaos]:
    screen.say(f"starting a cluster of {NODES} nodes on this machine")
    try:
        with tempfile.TemporaryDirectory(prefix="resilient-demo-") as folder, LocalCluster(NODES) as cluster:
            return _train(main, cluster, steps, seed, screen, Path(folder) / "all-has-happened")
    finally:
        _remove_files(main)


def _train(
    main: Any, cluster: LocalCluster, steps: int, seed: int, screen: Screen, marker: Path
) -> tuple[Result, Chaos]:
    screen.say(f"starting {NODES} ranks, one per node")
    watch = Watch()
    chaos = Chaos(
        cluster,
        watch,
        run=f"{main.settings.name}/1",
        ranks=NODES,
        steps=steps,
        seed=seed,
        say=lambda text: screen.say(text, "bold"),
        all_has_happened=marker,
    )
    follow = Follow(screen)

    def progress(news: dict[str, Any]) -> None:
        watch.update(news)
        follow(news)

    chaos.start()
    try:
        result = main.watched(progress, steps, Pace(steps=steps, step_s=STEP_S, all_has_happened=str(marker)))
    finally:
        watch.end()
    chaos.join(timeout=60.0)
    if chaos.error is not None and not isinstance(chaos.error, RunEnded):
        screen.say(f"the demo failed to do what it had planned: {chaos.error!r}", "red")
    return result, chaos


class Follow:
    """Shows the run's news: where it is, and every recovery as it ends."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self._recoveries = 0
        self._began = False

    def __call__(self, news: dict[str, Any]) -> None:
        if news["ranks"] and not self._began:
            self._began = True
            self._screen.say(f"training on {news['ranks']} ranks")
        loss = f"loss {news['rows'][-1]['loss']:.3f}, " if news["rows"] else ""
        more = f"{loss}{news['ranks']} ranks, generation {news['generation']}"
        self._screen.at(ON_CLUSTER, news["step"], more)
        for recovery in news["recoveries"][self._recoveries :]:
            self._screen.say(
                f"step {recovery['step']}: {recovery['kind']}: {recovery['ranks']} ranks go on, "
                f"{1000 * recovery['total_s']:.0f} ms ({recovery['reason']})",
                "green",
            )
        self._recoveries = len(news["recoveries"])


class Undisturbed:
    """The same run in one process, at the same time. A context: the process has ended after it."""

    def __init__(self, steps: int, screen: Screen, pipeline: bool = False) -> None:
        self._screen = screen
        self._steps, self._pipeline = steps, pipeline
        self._last: dict[str, Any] = {}

    def __enter__(self) -> Undisturbed:
        # A session of its own: Ctrl-C is for the demo, which then ends it.
        command = [sys.executable, "-m", ALONE, str(self._steps), str(os.getpid()), str(int(self._pipeline))]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        self._reader = threading.Thread(target=self._read, name="undisturbed", daemon=True)
        self._reader.start()
        return self

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._last = json.loads(line)
            if "step" in self._last:
                self._screen.at(ALONE_LABEL, self._last["step"] + 1, f"loss {self._last['loss']:.3f}")

    def outcome(self) -> dict[str, Any]:
        """Blocks until it has ended."""
        code = self._process.wait()
        self._reader.join()
        if code != 0 or "digest" not in self._last:
            raise ResilientError(f"the undisturbed run ended with exit status {code}; its error is printed above")
        return self._last

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.wait()


def show(outcome: Outcome, out: Path, screen: Screen) -> None:
    console = screen.console
    console.print()
    console.print(table(outcome.recoveries))
    console.print()
    text, style = verdict(outcome)
    console.print(text, style=style, highlight=False)
    if outcome.bubbles:
        console.print(in_words(outcome.bubbles), highlight=False)
    console.print(f"{outcome.seconds:.0f} s. Written: {out / 'result.json'}, {out / 'loss.png'}", highlight=False)


def _remove_files(main: Any) -> None:
    """What the node that was lost could not remove."""
    from actors.launch import FOLDER

    remove_files(FOLDER, f"{main.settings.name}-1-")
