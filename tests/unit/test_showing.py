"""What the controller shows: there with the run, gone with it, and never in the run's way."""

from __future__ import annotations

import json
import math
import queue
import socket
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from resilient.core.figures import Figures
from resilient.core.story import Happening
from resilient.metrics import Seen
from resilient.showing import Showing
from resilient.targets import VARIABLE
from tests.jobs import job
from tests.unit.test_feed import LOOK
from tests.unit.test_serving import until

LIMIT_S = 30.0


class Shown:
    def __init__(self, observe: str | None, port: int | None = None, *, anew: bool = True) -> None:
        self.said: queue.Queue[str] = queue.Queue()
        self.bound: queue.Queue[int] = queue.Queue()
        self.showing = Showing(
            job("gpt", observe=observe),
            "127.0.0.1",
            seen=lambda: Seen(figures=Figures(), look=LOOK),
            say=self.said.put,
            bound=self.bound.put,
        )
        self.showing.begin(anew=anew)
        self.showing.serve(port)

    def end(self) -> None:
        self.showing.conclude()
        self.showing.end()

    def url(self) -> str:
        """Once it is served."""
        while (text := self.said.get(timeout=LIMIT_S)) and not text.startswith("live page"):
            pass
        assert self.showing.view()["url"] in text
        return str(self.showing.view()["url"])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    return tmp_path


@pytest.fixture
def shown(folder: Path) -> Iterator[Callable[..., Shown]]:
    all_of_them: list[Shown] = []

    def make(*args: Any, **kwargs: Any) -> Shown:
        all_of_them.append(Shown(*args, **kwargs))
        return all_of_them[-1]

    yield make
    for each in all_of_them:
        each.end()


def read(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=LIMIT_S) as response:
        found: bytes = response.read()
        return found


def test_it_is_there_with_the_run_and_gone_with_it(folder: Path, shown: Callable[..., Shown]) -> None:
    found = shown("auto")
    url = found.url()
    assert b"resilient_step" in read(f"{url}metrics")
    assert json.loads(read(f"{url}api/run"))["now"]["state"] == "starting"
    assert found.bound.get(timeout=LIMIT_S) == int(url.strip("/").rpartition(":")[2])
    found.end()
    assert not (folder / "targets" / "gpt-1.json").exists()
    with pytest.raises(OSError, match="refused"):
        read(url)


def test_who_scrapes_is_to_see_the_end(
    folder: Path, shown: Callable[..., Shown], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("resilient.serving.METRICS_AGE_S", -1.0)
    found = shown("auto")
    url = found.url()
    read(url)
    assert not found.showing.is_awaited(time.monotonic()), "nobody has scraped it"
    read(f"{url}metrics")
    ended_at = time.monotonic()
    found.showing.conclude()
    assert json.loads((folder / "gpt" / "1" / "run.json").read_text())["now"]["run"] == "gpt"
    assert found.showing.is_awaited(ended_at) and (folder / "targets" / "gpt-1.json").exists()
    read(f"{url}metrics")
    until(lambda: not found.showing.is_awaited(ended_at))
    found.showing.end()
    assert not (folder / "targets" / "gpt-1.json").exists()


def test_what_happens_is_written_down_and_shown(folder: Path, shown: Callable[..., Shown]) -> None:
    found = shown("auto")
    found.showing.happened(Happening(kind="rank gone", reason="killed", generation=3, more={"rank": 1}), step=7)
    (shown_there,) = json.loads(read(f"{found.url()}api/run"))["history"]["happenings"]
    found.end()
    (line,) = (folder / "gpt" / "1" / "events.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert record == shown_there
    assert record.pop("time").startswith("20") and record.pop("unix") > 1e9
    gone = {"kind": "rank gone", "reason": "killed", "rank": 1}
    assert record == {"run": "gpt", "attempt": 1, "generation": 3, "step": 7, **gone}


def test_a_controller_that_comes_back_has_the_same_port_and_remembers(shown: Callable[..., Shown]) -> None:
    first = shown("auto")
    url = first.url()
    first.showing.happened(Happening(kind="run began"), step=0)
    first.end()
    second = shown("auto", int(url.strip("/").rpartition(":")[2]), anew=False)
    assert second.url() == url
    assert [each["kind"] for each in json.loads(read(f"{url}api/run"))["history"]["happenings"]] == ["run began"]


def losses_of(found: Shown) -> list[int]:
    return [step for step, _ in found.showing.feed.history(None)[0]["losses"]["points"]]


@pytest.mark.parametrize(("generation", "left"), [(0, 100), (1, 40)], ids=["known before", "later"])
def test_a_controller_that_comes_back_has_the_losses_and_knows_which_were_given_up(
    shown: Callable[..., Shown], generation: int, left: int
) -> None:
    first = shown(None)
    for step in range(100):
        first.showing.feed.loss(step, 1.0 if step else math.nan)
    first.end()
    second = shown(None, anew=False)
    second.showing.back_to(generation, 40)
    for step in range(36, 40):
        second.showing.feed.loss(step, 1.0)  # repeated
    assert losses_of(second) == list(range(left))
    second.end()
    assert losses_of(shown(None, anew=True)) == [], "of another cluster"


def test_what_was_kept_stays_until_a_controller_that_comes_back_knows_as_much(
    folder: Path, shown: Callable[..., Shown]
) -> None:
    first = shown(None)
    first.showing.feed.loss(0, 1.0)
    first.end()
    path = folder / "gpt" / "1" / "run.json"
    document = json.loads(path.read_text())
    document["now"]["generation"] = 3
    path.write_text(json.dumps(document))
    shown(None, anew=False).end()
    assert json.loads(path.read_text()) == document


def test_a_run_of_this_name_in_another_cluster_is_another_one(folder: Path, shown: Callable[..., Shown]) -> None:
    for _ in range(2):
        found = shown(None)
        found.showing.happened(Happening(kind="run began"), step=0)
        found.end()
    assert len((folder / "gpt" / "1" / "events.jsonl").read_text().splitlines()) == 1
    assert (folder / "gpt" / "1" / "events.jsonl.old").exists()


def test_a_port_that_is_taken_is_said_and_another_one_is_found(shown: Callable[..., Shown]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        found = shown(f"127.0.0.1:{port}")
        assert f"nothing can be served at 127.0.0.1:{port}" in found.said.get(timeout=LIMIT_S)
        url = found.url()
        assert f":{port}/" not in url and read(f"{url}metrics")


def test_a_host_that_is_not_this_one_is_said_and_the_node_alone_is_served(shown: Callable[..., Shown]) -> None:
    found = shown("192.0.2.254:9400")
    assert "nothing can be served at 192.0.2.254:9400" in found.said.get(timeout=LIMIT_S)
    assert found.url().startswith("http://127.0.0.1:")


def test_nothing_is_served_if_nothing_is_to_be(folder: Path, shown: Callable[..., Shown]) -> None:
    found = shown(None)
    found.end()
    assert found.said.empty() and found.showing.view()["url"] is None
    assert not (folder / "targets").exists()


def test_a_folder_that_can_t_be_had_is_said_and_gone_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shown: Callable[..., Shown]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(VARIABLE, str(tmp_path / "file"))
    found = shown("auto")
    assert found.said.get(timeout=LIMIT_S).startswith("no events.jsonl is written")
    found.showing.happened(Happening(kind="run began"), step=0)
    assert read(f"{found.url()}metrics")
    assert found.said.get(timeout=LIMIT_S).startswith("no target for Prometheus is written")
