"""The live page in a real browser, against a live run. Its pictures are kept in out/page."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

import resilient
from resilient.report import kept, write
from tests.integration.chromium import Chromium
from tests.integration.loops import train
from tests.integration.processes import Watched, until
from tests.integration.test_showing import url_of

pytestmark = pytest.mark.long

STEPS = 150
SHOWN_WITHIN_S = 2.0
PICTURES = Path(__file__).parents[2] / "out" / "page"
COUNT_RANKS = "document.querySelectorAll('#nodes .ranks li').length"
HAPPENINGS = "document.getElementById('happenings').textContent"


def test_nodes_appear_a_kill_shows_at_once_and_nothing_is_complained_of(cluster: Any, tmp_path: Path) -> None:
    function = train(
        "page",
        workers=(2, 3),
        detection_s=2.0,
        snapshot=resilient.Snapshot(every=1),
        checkpoint=resilient.Checkpoint(str(tmp_path / "stored"), every=10),
    )
    run = Watched(function, steps=STEPS, hold=str(tmp_path / "go"))
    run.at_step(5, ranks=3)
    url = url_of(run)
    with Chromium(tmp_path / "profile") as browser:
        browser.looks(width=1280, height=900, phone=False)
        browser.open(url)
        until(lambda: browser.says("document.querySelectorAll('#nodes > li').length") == 4, "nodes appear")
        until(lambda: browser.says(COUNT_RANKS) == 3, "ranks appear")
        assert browser.says("document.getElementById('state').textContent") == "training"
        assert browser.says("document.querySelectorAll('#loss path').length") == 1

        run.signal_rank(1)
        killed_at = time.monotonic()
        until(lambda: "rank gone" in browser.says(HAPPENINGS), "the kill shows", 30)
        assert time.monotonic() - killed_at < SHOWN_WITHIN_S, "what the page promises to whoever looks at it"
        run.until_recovered(1)
        run.until_recovered(2, ranks=3)
        until(lambda: browser.says("document.querySelectorAll('#recoveries tbody tr').length") >= 2, "recoveries show")
        until(lambda: "durable" in browser.says(HAPPENINGS), "a checkpoint shows")
        assert browser.says("document.querySelectorAll('#loss .mark:not(.planned)').length") == 1

        pictures(browser)
        run.result()
        until(lambda: browser.says("document.getElementById('state').textContent") == "finished", "the end shows", 30)
        browser.looks(width=1280, height=900, phone=False)
        report = tmp_path / "report.html"
        until(lambda: kept("page")["now"]["outcome"] is not None, "what a report is made of is written", 30)
        write(kept("page"), report)
        browser.open(report.as_uri())
        until(lambda: browser.says("document.querySelectorAll('#recoveries tbody tr').length") >= 2, "a report")
        assert browser.says("document.getElementById('state').textContent") == "finished"
        assert browser.says("document.querySelectorAll('#loss path').length") == 1
        browser.picture(PICTURES / "report.png")
        assert browser.complaints == []
        assert browser.asked.pop() == report.as_uri()
        assert browser.asked and all(each.startswith(url) for each in browser.asked)


def pictures(browser: Chromium) -> None:
    for name, width, phone, dark in (
        ("desktop", 1280, False, False),
        ("desktop-dark", 1280, False, True),
        ("phone", 390, True, False),
        ("phone-dark", 390, True, True),
    ):
        browser.looks(width=width, height=844, phone=phone, dark=dark)
        until(lambda: browser.says("document.querySelector('#loss svg').clientWidth <= innerWidth"), "drawn anew")
        assert browser.says("document.documentElement.scrollWidth <= innerWidth"), "nothing is cut off"
        browser.picture(PICTURES / f"{name}.png")
