"""What a live run serves: metrics while ranks and the controller die, events, and where Prometheus finds it."""

from __future__ import annotations

import json
import os
import signal
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

from actors import launch
from resilient.status import runs
from resilient.targets import VARIABLE
from tests.integration.loops import train
from tests.integration.processes import Watched, left_behind, until

STEPS = 60


def read(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=30) as response:
        found: bytes = response.read()
        return found


def url_of(run: Watched) -> str:
    def found() -> Any:
        return ray.get(run.controller.look.remote(), timeout=30)["observe"]["url"]

    return str(until(found, "the run is served"))


def scrape(url: str) -> dict[tuple[str, ...], float]:
    """By name and labels other than the run's name."""
    return {
        (sample.name, *(value for key, value in sorted(sample.labels.items()) if key != "run")): sample.value
        for family in text_string_to_metric_families(read(f"{url}metrics").decode())
        for sample in family.samples
    }


def test_metrics_count_what_happens_and_outlive_the_controller(cluster: Any, tmp_path: Path) -> None:
    run = Watched(train("shown", workers=2, detection_s=2.0), steps=STEPS, hold=str(tmp_path / "go"))
    run.at_step(3, ranks=2)
    url = url_of(run)
    assert scrape(url)["resilient_failures_total", "rank"] == 0
    run.signal_rank(1)
    run.until_recovered(1)
    found = scrape(url)
    assert found["resilient_failures_total", "rank"] == 1
    assert found["resilient_recoveries_total", "rank lost"] == 1
    assert found["resilient_recovery_seconds_count", "rank lost", "total"] == 1
    (target,) = json.loads((folder() / "targets" / "shown-1.json").read_text())
    assert f"http://{target['targets'][0]}/" == url

    pid = ray.get(run.controller.process.remote(), timeout=30)
    until(lambda: recorded(run), "what was counted is on record")
    run.kill_controller()

    def restarted() -> bool:
        try:
            return int(ray.get(run.controller.process.remote(), timeout=30)) != pid
        except ray.exceptions.RayActorError:
            return False

    until(restarted, "the controller is back")
    assert url_of(run) == url, "at the same port"
    found = scrape(url)
    assert found["resilient_failures_total", "rank"] == 1
    assert found["resilient_recoveries_total", "rank lost"] == 1
    assert run.result().step == STEPS

    until(lambda: left_behind("shown") == [], "nobody has scraped it for long", 150)
    assert not (folder() / "targets" / "shown-1.json").exists()
    lines = (folder() / "shown" / "1" / "events.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    kinds = [event["kind"] for event in events]
    assert kinds[0] == "run began" and kinds[-1] == "run ended" and "controller restarted" in kinds
    (gone,) = (event for event in events if event["kind"] == "rank gone")
    assert gone["rank"] == 1 and gone["reason"] and gone["node"] and gone["member"]
    ended = next(event for event in events if event["kind"] == "recovery ended")
    assert ended["recovery"] == "rank lost" and ended["total_s"] > 0 and ended["form_s"] > 0 and ended["step"] >= 0
    for event in events:
        assert {"time", "unix", "run", "attempt", "kind", "reason", "generation", "step"} <= event.keys()


@pytest.mark.long
def test_who_scrapes_sees_the_end_and_nobody_waits_for_that(cluster: Any, tmp_path: Path) -> None:
    run = Watched(train("scraped"), steps=STEPS, hold=str(tmp_path / "go"))
    run.at_step(3)
    url, controller = url_of(run), run.controller
    assert scrape(url)["resilient_ended",] == 0
    run.result()
    assert left_behind("scraped") == ["scraped/1/controller"], "the call has returned"
    assert runs("scraped") == []
    os.kill(ray.get(controller.process.remote(), timeout=30), signal.SIGKILL)
    until(lambda: left_behind("scraped") == [], "it is not started again", 60)

    again = Watched(train("scraped"), steps=STEPS, hold=str(tmp_path / "again"))
    again.at_step(3)
    url = url_of(again)
    assert scrape(url)["resilient_ended",] == 0
    again.result()
    (target,) = json.loads((folder() / "targets" / "scraped-2.json").read_text())
    assert f"http://{target['targets'][0]}/" == url
    until(lambda: scrape(url)["resilient_ended",] == 1, "the end is seen")
    until(lambda: left_behind("scraped") == [], "it is gone at once", 10)
    assert not (folder() / "targets" / "scraped-2.json").exists()

    third = Watched(train("scraped"), steps=STEPS, hold=str(tmp_path / "third"))
    third.at_step(3)
    scrape(url_of(third))
    third.result()
    fourth = Watched(train("scraped"), steps=STEPS, hold=str(tmp_path / "fourth"))
    fourth.at_step(3)
    assert not [name for name in launch.names("scraped/") if name.startswith("scraped/3/")], "it makes room"
    fourth.result()
    assert left_behind("scraped") == []


@pytest.mark.long
def test_if_it_is_wanted_ray_shows_the_metrics_too(cluster: Any, tmp_path: Path) -> None:
    run = Watched(train("twice", ray_metrics=True), steps=STEPS, hold=str(tmp_path / "go"))
    run.at_step(1)
    ports = {(node["NodeManagerAddress"], node["MetricsExportPort"]) for node in ray.nodes() if node["Alive"]}

    def shown() -> bool:
        texts = [read(f"http://{host}:{port}/metrics").decode() for host, port in sorted(ports)]
        return any("ray_resilient_failures_total{" in text and 'run="twice"' in text for text in texts)

    until(shown, "Ray shows it", 120)
    run.result()


def recorded(run: Watched) -> bool:
    record = json.loads(launch.read_key(f"{run.name}/1/counted") or b"{}")
    return bool(record) and "rank lost" in record["figures"]["recoveries"]


def folder() -> Path:
    return Path(os.environ[VARIABLE])
