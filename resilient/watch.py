"""A run in a terminal, as the live page shows it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from .core.spent import STATES
from .core.view import step_of

BLOCKS = "▁▂▃▄▅▆▇█"
COLOURS = {"productive": "green", "blocked": "yellow", "waiting": "bright_black", "starting": "magenta"}
RECENT = 6
MOST_RANKS = 16
BAR = 50
LOOK_EVERY_S = 0.5
PATIENCE_S, RESTART_S = 3.0, 20.0
"""How long nobody may answer: at first, and later, when the controller may be restarting."""


def watch(look: Callable[[], Mapping[str, Any] | None], console: Console, limit_s: float | None = None) -> bool:
    """Draw the run until it ends. look: as `Controller.shown` answers; None while it does not. limit_s: how long to
    watch; for ever if it is None. Whether anything has been seen."""
    began = heard_at = time.monotonic()
    seen = False
    with Live(Text("connecting"), console=console, auto_refresh=False) as live:
        while limit_s is None or time.monotonic() - began < limit_s:
            shown = look()
            if shown is None and time.monotonic() - heard_at > (RESTART_S if seen else PATIENCE_S):
                break
            if shown is not None:
                seen, heard_at = True, time.monotonic()
                live.update(drawn(shown, console.width), refresh=True)
                if shown["now"]["outcome"] is not None:
                    break
            time.sleep(LOOK_EVERY_S)
    return seen


def drawn(shown: Mapping[str, Any], width: int) -> RenderableType:
    now, history = shown["now"], shown["history"]
    return Group(
        _head(now),
        _glance(now),
        Text(),
        _losses([loss for _, loss in history["losses"]["points"]], max(20, min(width - 30, 100))),
        _spent(now["spent"]),
        Text(),
        _ranks(now),
        *_recoveries(history["recoveries"]),
        *_happenings(history["happenings"]),
    )


def _head(now: Mapping[str, Any]) -> Text:
    style = {"training": "bold green", "finished": "bold green"}.get(now["state"], "bold yellow")
    head = Text(f"{now['run']}, attempt {now['attempt']}  ")
    head.append(now["state"], style).append(f"  {now['detail']}")
    return head


def _glance(now: Mapping[str, Any]) -> Text:
    snapshots, checkpoints = now["snapshots"], now["checkpoints"]
    parts = [
        step_of(now),
        f"loss {_number(now['loss'])}",
        f"{_seconds(now['step_s'])} a step",
        f"generation {now['generation']}",
        f"{len(now['ranks'])} of {now['wanted']['min']} to {now['wanted']['max']} ranks",
    ]
    if snapshots:
        parts.append(f"step {int(snapshots['protected'])} protected" if snapshots["protected"] >= 0 else "unprotected")
    if checkpoints:
        durable = checkpoints["durable"]
        parts.append(f"step {durable} durable" if durable >= 0 else "nothing durable yet")
    return Text("  ".join(parts))


def _losses(losses: Sequence[float | None], width: int) -> Text:
    """One column for some steps each: their mean."""
    known = [loss for loss in losses if loss is not None]
    if not known:
        return Text("loss  none yet")
    each = max(1, -(-len(known) // width))
    means = [sum(known[at : at + each]) / len(known[at : at + each]) for at in range(0, len(known), each)]
    low, high = min(means), max(means)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    line = "".join(BLOCKS[round((mean - low) * scale)] for mean in means)
    return Text("loss  ").append(line, "cyan").append(f"  {_number(low)} to {_number(high)}")


def _spent(spent: Mapping[str, float]) -> Text:
    total_s = sum(spent[state] for state in STATES)
    line = Text("time  ")
    if total_s <= 0:
        return line.append("nothing is accounted for yet")
    for state in STATES:
        line.append("█" * round(BAR * spent[state] / total_s), COLOURS.get(state, "red"))
    said = (f"{state} {spent[state] / total_s:.1%}" for state in STATES if spent[state] >= 0.001 * total_s)
    return line.append("\n      " + ", ".join(said))


def _ranks(now: Mapping[str, Any]) -> RenderableType:
    table = Table(box=None, pad_edge=False, header_style="bold")
    in_stages = any("layers" in seat for seat in now["ranks"])
    for column in ("rank", "node", "state", "speed", *(("layers", "idle") if in_stages else ())):
        table.add_column(column, justify="left" if column in ("node", "state") else "right")
    for seat in now["ranks"][:MOST_RANKS]:
        layers = f"{seat['layers'][0]}-{seat['layers'][1] - 1}" if "layers" in seat else "-"
        idle = f"{seat['idle']:.0%}" if "idle" in seat else "-"
        speed = "-" if seat.get("speed") is None else f"{seat['speed']:.2f}"
        row = (str(seat["rank"]), seat["node"][:8], seat["state"], speed)
        table.add_row(*row, *((layers, idle) if in_stages else ()))
    more = len(now["ranks"]) - MOST_RANKS
    others = len(now["others"])
    said = [f"{more} more ranks"] if more > 0 else []
    said += [f"{others} other process{'' if others == 1 else 'es'}"] if others else []
    return Group(table, Text(", ".join(said), "bright_black")) if said else table


def _recoveries(recoveries: Sequence[Mapping[str, Any]]) -> list[RenderableType]:
    if not recoveries:
        return []
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("step", "recovery", "seconds", "why"):
        table.add_column(column, justify="right" if column in ("step", "seconds") else "left")
    for each in recoveries[: -RECENT - 1 : -1]:
        table.add_row(str(each["step"]), each["recovery"], f"{each['total_s']:.2f}", each["reason"])
    return [Text(), table]


def _happenings(happenings: Sequence[Mapping[str, Any]]) -> list[RenderableType]:
    lines = [
        Text(
            f"{time.strftime('%H:%M:%S', time.localtime(each['unix']))}  {each['kind']}: {each['reason']}".rstrip(": ")
        )
        for each in happenings[: -RECENT - 1 : -1]
    ]
    return [Text(), *lines] if lines else []


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _seconds(value: float | None) -> str:
    return "-" if not value else f"{value:.2f} s"
