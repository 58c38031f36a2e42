"""What a person sees of a run on a terminal, and in the log where there is none."""

from __future__ import annotations

import io
import itertools
import logging
import re
from typing import Any

import pytest
from rich.console import Console

from resilient.progress import on_terminal


def news(step: int, steps: int | None, *messages: str, back_to: int | None = None) -> dict[str, Any]:
    rows = [{"step": float(other), "loss": 0.5} for other in range(step)]
    told = {"rows": rows, "step": step, "steps": steps, "ranks": 2, "generation": 3, "back_to": back_to}
    return {**told, "messages": list(messages)}


class Terminal:
    def __init__(self, width: int = 100) -> None:
        self.file = io.StringIO()
        self.console = Console(force_terminal=True, file=self.file, width=width, color_system="truecolor")

    def lines(self) -> list[str]:
        """All that was ever written, without colours and movements of the cursor."""
        plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.file.getvalue())
        return [line.strip() for line in re.split(r"[\r\n]+", plain) if line.strip()]


def told(*all_of_them: dict[str, Any], width: int = 100) -> Terminal:
    terminal = Terminal(width)
    with on_terminal("gpt", terminal.console) as tell:
        for each in all_of_them:
            tell(each)
            terminal.console.print()  # the line is drawn with it
    return terminal


def test_a_bar_where_the_number_of_steps_is_known() -> None:
    lines = told(news(0, 100), news(40, 100)).lines()
    assert re.fullmatch(r"gpt ━+[━╸╺]━+ step 40 of 100, loss 0.5000, 2 ranks, generation 3", lines[-1])


def test_a_line_where_it_is_not() -> None:
    lines = told(news(40, None)).lines()
    assert any(line.endswith("gpt: step 40, loss 0.5000, 2 ranks, generation 3") for line in lines)
    assert not any("left" in line for line in lines)


def test_a_bar_comes_once_it_is_known() -> None:
    lines = told(news(0, None), news(1, 100)).lines()
    assert "gpt: step 0, 2 ranks" in "".join(lines) and "step 1 of 100" in lines[-1]


def test_it_goes_back_with_the_run() -> None:
    lines = told(news(60, 100), news(50, 100, back_to=48)).lines()
    assert "step 50 of 100, loss" in lines[-1], "what was computed before tells nothing of the time that is left"


def test_what_was_not_computed_now_is_not_taken_for_speed() -> None:
    """An attempt that takes up where the last one was is there at once."""
    assert "left" not in told(news(0, 100), news(90, 100, back_to=90), news(90, 100)).lines()[-1]


def test_the_time_that_is_left() -> None:
    terminal, seconds = Terminal(), itertools.count()
    terminal.console.get_time = lambda: float(next(seconds))  # type: ignore[method-assign]
    with on_terminal("gpt", terminal.console) as tell:
        for step in range(5):
            tell(news(step, 100))
    assert re.search(r"step 4 of 100, \d+:\d\d:\d\d left, loss", terminal.lines()[-1])


def test_it_fits_into_a_narrow_terminal() -> None:
    (line,) = {line for line in told(news(40, 100), width=40).lines() if "step 40" in line}
    assert len(line) <= 40 and "step 40 of 100" in line


def test_messages_go_above_it_once_each_and_dimmed() -> None:
    terminal = told(news(1, 9, "one [b]"), news(2, 9, "one [b]", "two"), news(3, 9, "two", "three"))
    assert [line for line in terminal.lines() if line in ("one [b]", "two", "three")] == ["one [b]", "two", "three"]
    assert "\x1b[2mtwo\x1b[0m" in terminal.file.getvalue()


def test_without_a_terminal_there_is_only_the_log(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO, "resilient")
    with on_terminal("gpt") as tell:
        tell(news(1, 9, "one"))
        tell(news(2, 9, "one", "two"))
    assert caplog.messages == ["gpt: one", "gpt: two"]
    assert capsys.readouterr() == ("", "")
