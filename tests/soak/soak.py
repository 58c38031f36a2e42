"""One run on a local cluster that things happen to for some minutes; are its bits those of an undisturbed one?"""

from __future__ import annotations

import contextlib
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from resilient.demo import ray_quiet
from resilient.demo_cluster import LocalCluster, remove_files
from resilient.demo_result import versions
from resilient.result import Result

from .loop import NAME, NODES, STEP_S, soak

END_LIMIT_S = 30.0
OUT = Path("out/soak")


def run_soak(*, minutes: float, seed: int, out: Path = OUT) -> dict[str, Any]:
    """Writes result.json and, should it fail, the run's messages and Ray's logs, into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    account = Account(out / f"seed-{seed}.log")
    result: dict[str, Any] = {"seed": seed, "minutes": minutes, "identical": False}
    with tempfile.TemporaryDirectory(prefix="resilient-soak-") as folder, account:
        end = Path(folder) / "last-step"
        function = soak(Path(folder) / "checkpoints")
        account.say(f"starting a cluster of {NODES} nodes; seed {seed}, {minutes:g} minutes")
        try:
            with ray_quiet(out / f"seed-{seed}-ray.log"), LocalCluster(NODES) as cluster:
                reached = _on_cluster(cluster, function, end, seed, 60.0 * minutes, account, result, out)
        finally:
            _remove_files()
        if reached is not None:
            account.say("the same in one process")
            result.update(compared(reached, soak(None).local(str(end), 0.0)))
        result["checkpoint_folders"] = len(list((Path(folder) / "checkpoints").glob("step-*")))
    result["passed"] = result["identical"] and not result["leaks"]["found"]
    (out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def _on_cluster(
    cluster: LocalCluster, function: Any, end: Path, seed: int, seconds: float, account: Account,
    result: dict[str, Any], out: Path,
) -> Any:  # fmt: skip
    from actors import launch

    from .leaks import Sampler
    from .striker import Progress, Striker  # ray may be imported only now: see LocalCluster

    progress = Progress(account.told)
    sampler = Sampler(Path(launch.FOLDER), f"{NAME}-")
    sampler.start()
    striker = Striker(
        cluster=cluster, progress=progress, run=NAME, seed=seed, seconds=seconds, end=end, say=account.say
    )  # fmt: skip
    striker.start()
    reached = None
    try:
        reached = function.watched(progress, str(end), STEP_S)
    except Exception as error:  # noqa: BLE001  whatever it is, it is this soak's result
        result["error"] = f"{type(error).__name__}: {error}"
        account.say(f"FAILED: {result['error']}")
        _keep_logs(out / f"seed-{seed}-logs")
    recoveries = progress.news["recoveries"]
    result["faults"] = dict(Counter(act["kind"] for act in striker.acts))
    result["spared"] = dict(striker.spared)
    result["recoveries"] = len(recoveries)
    result["recoveries_by"] = dict(Counter(f"{item['kind']} from {item['source']}" for item in recoveries))
    result["replayed"] = sum(item["replayed"] for item in recoveries)
    result["stand_still_s"] = _stand_still([item["total_s"] for item in recoveries], progress.longest_s)
    result["versions"] = versions()
    result["acts"] = striker.acts
    result["leaks"] = _leaks(sampler, launch)
    return reached


def compared(reached: Result, alone: Result) -> dict[str, Any]:
    """Rows of steps that died with all ranks before anybody could tell are missing, which is no difference."""
    losses = {row["step"]: row["loss"] for row in alone.metrics}
    assert len(losses) == alone.step, "the undisturbed run did not begin at the beginning"
    differ = [int(row["step"]) for row in reached.metrics if row["loss"] != losses[row["step"]]]
    return {
        "identical": (alone.step, alone.digest) == (reached.step, reached.digest) and not differ,
        "steps": reached.step,
        "digest": reached.digest,
        "digest_undisturbed": alone.digest,
        "losses_that_differ": differ[:10],
        "rows_missing": alone.step - len(reached.metrics),
    }


def _stand_still(seconds: list[float], longest_s: float) -> dict[str, float]:
    """Of recoveries that the controller saw begin and end, and the longest time without a step whatever happened."""
    rounded = [round(value, 3) for value in seconds]
    middle = round(statistics.median(rounded), 3) if rounded else 0.0
    return {"median": middle, "worst": max(rounded, default=0.0), "longest_without_a_step": round(longest_s, 1)}


def _leaks(sampler: Any, launch: Any) -> dict[str, Any]:
    from .leaks import processes_left

    judged = sampler.end()
    left: dict[str, Callable[[], list[str]]] = {
        "actors": lambda: launch.names(f"{NAME}/"),
        "processes": processes_left,
        "shared memory": lambda: [str(path) for path in Path(launch.FOLDER).glob(f"{NAME}-*")],
        "keys": lambda: launch.list_keys(f"{NAME}/"),
    }
    deadline = time.monotonic() + END_LIMIT_S
    while any(look() for look in left.values()) and time.monotonic() < deadline:
        time.sleep(0.5)
    remains = {what: found for what, look in left.items() if (found := look())}
    grown = [name for name, verdict in judged.items() if verdict is not None and verdict["leak"]]
    found = [*grown, *(f"{what} left: {', '.join(names)}" for what, names in remains.items())]
    return {"found": found, "judged": judged}


def _keep_logs(folder: Path) -> None:
    """Of Ray's processes, the actors' among them."""
    import ray

    shutil.rmtree(folder, ignore_errors=True)
    node: Any = ray._private.worker._global_node
    logs = Path(node.get_session_dir_path()) / "logs"
    with contextlib.suppress(shutil.Error, OSError):  # some are still being written
        shutil.copytree(logs, folder, ignore=shutil.ignore_patterns("*agent*", "events", "old", "monitor*"))


def _remove_files() -> None:
    from actors.launch import FOLDER

    remove_files(FOLDER, f"{NAME}-")


class Account:
    """Prints what happens, and keeps it in a file with every message of the run."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._screen = sys.stdout
        """Ray's own account of every death goes elsewhere."""
        self._began = time.monotonic()
        self._recoveries = 0
        self._messages: dict[str, None] = {}

    def __enter__(self) -> Account:
        self._file = self._path.open("w", buffering=1)
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def say(self, text: str) -> None:
        line = f"{time.strftime('%H:%M:%S')} {time.monotonic() - self._began:6.1f} s  {text}"
        print(line, flush=True, file=self._screen)
        print(line, file=self._file)

    def told(self, news: dict[str, Any]) -> None:
        for message in news["messages"]:
            if message not in self._messages:
                self._messages[message] = None
                print(f"        the run: {message}", file=self._file)
        for recovery in news["recoveries"][self._recoveries :]:
            back = f", back to step {recovery['restored_step']}" if recovery["restored_step"] >= 0 else ""
            self.say(
                f"step {recovery['step']}: {recovery['kind']}: {recovery['ranks']} ranks go on from "
                f"{recovery['source']}{back} after {recovery['total_s']:.2f} s ({recovery['reason']})"
            )
        self._recoveries = len(news["recoveries"])
