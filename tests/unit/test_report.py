"""A run as one file: everything is in it, and nothing is asked for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from resilient.cli import main
from resilient.core.figures import Figures
from resilient.core.story import Happening
from resilient.feed import Feed
from resilient.metrics import Seen
from resilient.report import KEPT, as_html, kept
from resilient.targets import VARIABLE
from tests.unit.test_feed import LOOK
from tests.unit.test_showing import Shown


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    return tmp_path


def document(**more: Any) -> dict[str, Any]:
    feed = Feed(lambda: Seen(figures=Figures(), look={**LOOK, **more}))
    feed.loss(0, 1.5)
    return {"now": feed.now(), "history": feed.history(None)[0]}


def leave(folder: Path, run: str, attempt: int, **more: Any) -> None:
    path = folder / run / str(attempt) / KEPT
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(document(attempt=attempt, **more)))


def test_all_is_in_it_and_nothing_is_asked_for() -> None:
    text = as_html(document(messages=["</script><b>bold"]))
    assert not re.search(r"(src|href)=", text) and "import " not in re.findall(r"<script.*", text)[-1]
    assert "@import" not in text and "url(" not in text
    (content,) = re.findall(r'(?s)<script type="application/json" id="kept">(.*?)</script>', text)
    read = json.loads(content)
    assert read["now"]["messages"] == ["</script><b>bold"] and read["history"]["losses"]["points"] == [[0, 1.5]]
    assert "function draw(" in text and "<style>" in text


def test_the_last_attempt_is_reported_on_if_none_is_named(folder: Path) -> None:
    for attempt in (2, 10, 9):
        leave(folder, "gpt", attempt)
    assert kept("gpt")["now"]["attempt"] == 10
    assert kept("gpt", 9)["now"]["attempt"] == 9
    with pytest.raises(FileNotFoundError, match=r"attempt 3 of run 'gpt' \(there are \[2, 9, 10\]\)"):
        kept("gpt", 3)
    with pytest.raises(FileNotFoundError, match=r"run 'other' in .* there is something of gpt"):
        kept("other")


def test_the_command(folder: Path) -> None:
    leave(folder, "gpt", 1)
    out = folder / "report.html"
    found = CliRunner().invoke(main, ["report", "gpt", "-o", str(out)])
    assert found.exit_code == 0 and out.read_text().startswith("<!doctype html>"), found.output
    assert f"{out}: gpt, attempt 1" in found.output
    assert json.loads(CliRunner().invoke(main, ["report", "gpt", "--json"]).output)["now"]["run"] == LOOK["run"]
    assert CliRunner().invoke(main, ["report", "other"]).exit_code == 1


def test_a_controller_leaves_what_a_report_is_made_of(folder: Path) -> None:
    showing = Shown(None).showing
    showing.happened(Happening(kind="run began"), 0)
    showing.conclude()
    showing.end()
    assert [each["kind"] for each in kept("gpt")["history"]["happenings"]] == ["run began"]
