"""What a person sees of the demo: two progress bars that stay, and a line for everything that happens.

Where there is no terminal, the same as plain lines.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from .demo_result import PHASES, Outcome

PLAIN_LINE_EVERY_STEPS = 20


class Screen:
    """Threads may call it at any time."""

    def __init__(self, console: Console, steps: int) -> None:
        self.console = console
        self._steps = steps
        self._began_at = time.monotonic()
        self._lock = threading.Lock()
        self._plain_at: dict[str, int] = {}
        self._progress = Progress(
            TextColumn("{task.description:<24}"),
            BarColumn(28),
            TextColumn("step {task.completed:>3}/{task.total}"),
            TextColumn("{task.fields[more]}"),
            console=console,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._bars: dict[str, TaskID] = {}

    def __enter__(self) -> Screen:
        if self.console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def say(self, text: str, style: str = "") -> None:
        """Something has happened or begins."""
        passed = f"{time.monotonic() - self._began_at:6.1f} s  "
        self.console.print(Text.assemble((passed, "dim"), (text, style)), soft_wrap=not self.console.is_terminal)

    def at(self, run: str, step: int, more: str) -> None:
        """Run `run` has committed so many steps."""
        with self._lock:
            if not self.console.is_terminal:
                self._plain(run, step, more)
                return
            if run not in self._bars:
                self._bars[run] = self._progress.add_task(run, total=self._steps, more="")
            self._progress.update(self._bars[run], completed=step, more=more)

    def _plain(self, run: str, step: int, more: str) -> None:
        due = self._plain_at.get(run, 0)
        if step >= due and step:
            self._plain_at[run] = step - step % PLAIN_LINE_EVERY_STEPS + PLAIN_LINE_EVERY_STEPS
            self.say(f"{run}: step {step}/{self._steps}, {more}")


def table(recoveries: list[dict[str, Any]]) -> Table:
    """One row per recovery, with the time of each phase."""
    found = Table(title="What it cost, in milliseconds", title_justify="left")
    for name in ("step", "what", "ranks"):
        found.add_column(name, justify="left" if name == "what" else "right")
    for phase in PHASES:
        found.add_column(phase.removesuffix("_s"), justify="right")
    for recovery in recoveries:
        times = [f"{1000 * recovery[phase]:.0f}" for phase in PHASES]
        found.add_row(str(recovery["step"]), recovery["kind"], str(recovery["ranks"]), *times)
    found.caption = (
        "detect: from the last sign of life to the verdict. decide: to the new generation. form: until its ranks "
        "are connected and level, joiners with the state. redo: to the next committed step."
    )
    found.caption_justify = "left"
    return found


def verdict(outcome: Outcome) -> tuple[str, str]:
    """In words, and the style they deserve."""
    if not outcome.identical:
        return (
            f"DIFFERENT: the state after {outcome.steps} steps has digest {outcome.digest} on the cluster and "
            f"{outcome.digest_undisturbed} in one process",
            "bold red",
        )
    same = (
        f"IDENTICAL: after {outcome.steps} steps all {outcome.parameters:,} parameters, the optimizer and the schedule "
        f"have the same bits as in one process that nothing happened to (digest {outcome.digest})"
    )
    if outcome.survived_all:
        return same, "bold green"
    return f"{same}; but not all that was planned has happened and been recovered from", "bold red"
