"""What a person sees while a run goes on."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.spinner import Spinner
from rich.table import Column
from rich.text import Text

log = logging.getLogger("resilient")

SAY_AFTER_S, SAY_AGAIN_S = 3.0, 10.0

News = dict[str, Any]
"""As the driver passes it on: what the controller tells, and all rows so far."""


@contextmanager
def on_terminal(name: str, console: Console | None = None) -> Iterator[Callable[[News], None]]:
    """A line that is kept up to date on a terminal, with a bar once it is known how many steps there are; elsewhere
    only the log, and on stderr that the run waits for nodes. console: that terminal, if it isn't what stderr is."""
    fresh = _Messages().fresh
    if console is None and not sys.stderr.isatty():
        waiting = _Waiting(name)

        def write(news: News) -> None:
            for text in fresh(news):
                log.info("%s: %s", name, text)
            waiting.look(news.get("waiting"))

        yield write
        return
    terminal = console if console is not None else Console(stderr=True)
    line = _Line(name, terminal)
    live = Live(console=terminal, transient=True)

    def show(news: News) -> None:
        live.start()  # not before: what Ray says as it starts goes past it, and would be written over it
        for text in fresh(news):
            terminal.print(text, style="dim", highlight=False, markup=False)
        line.take(news)
        live.update(line.drawn(), refresh=True)

    try:
        yield show
    finally:
        live.stop()


class _Waiting:
    """Says on stderr that a run waits for nodes: as soon as that is more than its beginning, and again each time it has
    waited twice as long."""

    def __init__(self, name: str) -> None:
        self._name, self._next_s = name, SAY_AFTER_S

    def look(self, waiting: dict[str, Any] | None) -> None:
        if waiting is None:
            self._next_s = SAY_AFTER_S
        elif waiting["for_s"] >= self._next_s:
            self._next_s = max(SAY_AGAIN_S, 2 * waiting["for_s"])
            text = f"waiting for nodes for {waiting['for_s']:.0f} s: {waiting['why']}"
            print(f"{self._name}: {text}", file=sys.stderr, flush=True)


class _Messages:
    def __init__(self) -> None:
        self._last = ""

    def fresh(self, news: News) -> list[str]:
        """Those after the last one shown; older ones are dropped from the front of the list."""
        messages: list[str] = news["messages"]
        found = messages[messages.index(self._last) + 1 :] if self._last in messages else messages
        self._last = messages[-1] if messages else ""
        return found


class _Line:
    """What stays at the bottom: a spinner, and from when the number of steps is known a bar."""

    def __init__(self, name: str, console: Console) -> None:
        self._name = name
        self._spinner = Spinner("dots", text=Text(name), style="status.spinner")
        columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=None), _Standing())
        self._bar = Progress(*columns, console=console, expand=True)

    def drawn(self) -> RenderableType:
        return self._bar if self._bar.tasks else self._spinner

    def take(self, news: News) -> None:
        step, steps = news["step"], news["steps"]
        loss = f", loss {news['rows'][-1]['loss']:.4f}" if news["rows"] else ""
        ranks = f"{news['ranks']} rank{'' if news['ranks'] == 1 else 's'}"
        more = f"{loss}, {ranks}, generation {news['generation']}"
        if steps is None:
            self._spinner.update(text=Text(f"{self._name}: step {step}{more}"))
            return
        if not self._bar.tasks:
            self._bar.add_task(self._name, total=steps, completed=step, more=more)
        (task,) = self._bar.tasks
        if news["back_to"] is not None or step < task.completed:
            # Steps that were not computed just now say nothing of the time that is left.
            self._bar.reset(task.id, completed=step)
        self._bar.update(task.id, total=steps, completed=step, more=more)


class _Standing(ProgressColumn):
    """What matters most comes first: a narrow terminal cuts off the rest."""

    def __init__(self) -> None:
        super().__init__(Column(no_wrap=True))

    def render(self, task: Task) -> Text:
        left_s = task.time_remaining
        left = "" if left_s is None else f", {timedelta(seconds=round(left_s))} left"
        return Text(f"step {task.completed} of {task.total}{left}{task.fields['more']}")
