"""What a person sees while a run goes on."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

log = logging.getLogger("resilient")


@contextmanager
def on_terminal(name: str) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A line that is kept up to date on a terminal; elsewhere only the log."""
    last = ""

    def new_messages(news: dict[str, Any]) -> list[str]:
        """Those after the last one shown; older ones are dropped from the front of the list."""
        nonlocal last
        messages: list[str] = news["messages"]
        fresh = messages[messages.index(last) + 1 :] if last in messages else messages
        last = messages[-1] if messages else ""
        return fresh

    if not sys.stderr.isatty():

        def write(news: dict[str, Any]) -> None:
            for text in new_messages(news):
                log.info("%s: %s", name, text)

        yield write
        return
    from rich.console import Console

    console = Console(stderr=True)
    with console.status(f"{name}: starting") as status:

        def show(news: dict[str, Any]) -> None:
            for text in new_messages(news):
                console.print(text, style="dim", highlight=False)
            loss = f", loss {news['rows'][-1]['loss']:.4f}" if news["rows"] else ""
            status.update(f"{name}: step {news['step']}{loss}, {news['ranks']} ranks, generation {news['generation']}")

        yield show
