"""What `resilient check` has found, for people and for programs."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

COLUMNS = 110


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutResult:
    """One way in which the first steps were run.

    steps: after how many of them the bits were compared. ok: whether all were as in one process; None where the layout
    was not run, and `note` says why.
    """

    name: str
    steps: int = 0
    seconds: float = 0.0
    ok: bool | None = None
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The first thing that goes differently in a layout.

    kind: "bits" differ, an "exception" was raised, a process has "died", or a layout "hangs". step: in which, from 0.
    path: of the value, such as "ema.n_averaged" or "run.state.count"; "" where there is none. values: which differ,
    by layout. others: how many more paths differ after that step. cause: the likely one. remedy: what to write instead.
    detail: a traceback, and what the script printed.
    """

    kind: Literal["bits", "exception", "died", "hangs"]
    layout: str
    step: int
    path: str
    values: dict[str, str]
    cause: str
    remedy: str
    others: int = 0
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """Whether the first steps of a training function have the same bits in every layout."""

    passed: bool
    layouts: tuple[LayoutResult, ...]
    findings: tuple[Finding, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        width = max(len(layout.name) for layout in self.layouts)
        for layout in self.layouts:
            yield f"{_MARKS[layout.ok]:8} {layout.name:{width}}  {_in_words(layout)}".rstrip()
        told: dict[str, str] = {}
        for finding in self.findings:
            yield ""
            yield f"{finding.layout}: {_what(finding)}"
            yield from (f"  {where}: {value}" for where, value in finding.values.items())
            if finding.cause in told:
                yield f"  cause: as in {told[finding.cause]}"
            else:
                told[finding.cause] = finding.layout
                yield from _wrapped(f"cause: {finding.cause}")
                yield from _wrapped(f"remedy: {finding.remedy}")
            yield from (f"  | {line}" for line in finding.detail.splitlines())
        yield ""
        yield self._verdict()

    def _verdict(self) -> str:
        compared = [layout for layout in self.layouts if layout.ok is not None]
        if self.passed:
            return f"passed: the same bits in {len(compared)} layouts"
        if len(self.layouts) == 1:
            return "failed in one process already, so that no other layout was run"
        bad = sum(layout.ok is False for layout in compared)
        return f"failed: {bad} of {len(compared)} layouts train differently, or not at all"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, COLUMNS, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)


_MARKS = {True: "ok", False: "DIFFERS", None: "-"}


def _in_words(layout: LayoutResult) -> str:
    if layout.ok is None:
        return layout.note
    note = f"; {layout.note}" if layout.note else ""
    return f"{layout.steps} {'step' if layout.steps == 1 else 'steps'} compared, {layout.seconds:.1f} s{note}"


def _what(finding: Finding) -> str:
    where = f"in step {finding.step}"
    match finding.kind:
        case "bits":
            more = f", and {finding.others} more" if finding.others else ""
            return f"{finding.path} differs after step {finding.step}{more}"
        case "exception":
            return f"an exception {where}"
        case "died":
            return f"a process died {where}"
        case "hangs":
            return f"nothing happens any more {where}"
