"""A real Prometheus of a test's own, which scrapes every second and lets alerts wait for nothing."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

from resilient.dashboards.export import own
from tests.integration.processes import until

JOB = "resilient"


def program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.fail(f"{name} is missing: `make test-long` installs it, or `apt-get install prometheus`")
    return found


class Prometheus:
    """With our rules and scrape configuration, in this folder. Use as a context manager.

    targets: where runs announce themselves; a folder of its own if it is not given.
    """

    def __init__(self, folder: Path, targets: Path | None = None) -> None:
        self._folder = folder
        self._targets = targets or folder / "targets"
        self._targets.mkdir(parents=True, exist_ok=True)
        folder.mkdir(exist_ok=True)
        (folder / "prometheus.yaml").write_text(yaml.safe_dump(self._configuration()))
        (folder / "rules.yaml").write_text(yaml.safe_dump(impatient_rules()))
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]

    def _configuration(self) -> dict[str, Any]:
        """Ours, but for its paces and where runs announce themselves."""
        found: dict[str, Any] = yaml.safe_load(own("prometheus.yaml"))
        found["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        (job,) = found["scrape_configs"]
        job["file_sd_configs"] = [{"files": [f"{self._targets}/*.json"], "refresh_interval": "1s"}]
        return found

    def __enter__(self) -> Prometheus:
        command = [
            program("prometheus"),
            f"--config.file={self._folder / 'prometheus.yaml'}",
            f"--storage.tsdb.path={self._folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{self._port}",
        ]
        with (self._folder / "log").open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        until(self._answers, "Prometheus answers", 30)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def _answers(self) -> bool:
        assert self._process.poll() is None, (self._folder / "log").read_text()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/-/ready", timeout=5):
                return True
        except OSError:
            return False

    def announce(self, run: str, address: str) -> None:
        """As runs do: what is at host:port is scraped from now on."""
        (self._targets / f"{run}-1.json").write_text(json.dumps([{"targets": [address]}]))

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Labels under "metric", time and value under "value"."""
        asked = urllib.parse.urlencode({"query": expression})
        with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/api/v1/query?{asked}", timeout=30) as answer:
            found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
        return found

    def firing(self) -> list[dict[str, Any]]:
        """Alerts, each with its labels and annotations, in order of their names."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/api/v1/alerts", timeout=30) as answer:
            alerts: list[dict[str, Any]] = json.load(answer)["data"]["alerts"]
        return sorted(
            (each for each in alerts if each["state"] == "firing"), key=lambda each: str(each["labels"]["alertname"])
        )


def impatient_rules() -> dict[str, Any]:
    """Ours; alerts fire at once. How long they wait otherwise, promtool has tested."""
    rules: dict[str, Any] = yaml.safe_load(own("rules.yaml"))
    for group in rules["groups"]:
        for rule in group["rules"]:
            rule.pop("for", None)
    return rules
