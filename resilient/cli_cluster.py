"""`resilient status`, `drain` and `chaos`: what goes on in a cluster, how to leave a node, how to disturb a run."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from .cli_output import FOUND_BAD, WRONG_USE, answering, in_byte_count
from .faults import KINDS, Kind, choose, kinds_from
from .job import in_seconds

if TYPE_CHECKING:
    from .chaos import Victim


def _size(_context: click.Context, _option: click.Parameter, value: str | None) -> int | None:
    found = None if value is None else in_byte_count(value)
    if value is not None and found is None:
        raise click.BadParameter(f'{value!r}: is a size, such as "500MiB", "30GiB" or "30GB"')
    return found


def _time(_context: click.Context, _option: click.Parameter, value: str) -> float:
    found = in_seconds(value)
    if found is None:
        raise click.BadParameter(f'{value!r}: is a time, such as "5s", "10min" or "2h"')
    return found


@click.command()
@click.argument("run", required=False)
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def status(run: str | None, as_json: bool) -> None:
    """What the runs in this cluster are doing, or this RUN.

    Exits with 1 if nothing is running.
    """
    with answering(as_json) as answer:
        from .status import attach, describe, runs

        attach()
        describe(answer, runs(run), run)


@click.command()
@click.argument("node")
@click.option("--run", help="Only this run; without it, all that are going on.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document; progress goes to stderr.")
def drain(node: str, run: str | None, as_json: bool) -> None:
    """Have the runs in this cluster leave NODE: an id, the beginning of one, or an IP address.

    Nothing is aborted or computed again. Waits until the node holds nothing of them. Exits with 1 if too few workers
    would be left and there is no room elsewhere: then the node stays asked to leave, and is left once there is.
    """
    with answering(as_json) as answer:
        import ray

        from .drain import drain as drain_from
        from .drain import node_named
        from .status import attach

        attach()
        name = node_named(node, ray.nodes())
        found = drain_from(name, run, lambda line: click.echo(line, err=as_json))
        runs = [{"run": each.run, "attempt": each.attempt, "state": each.state, "why": each.why} for each in found]
        answer.document.update(node=name, runs=runs)
        answer.good = bool(found) and all(each.state != "stuck" for each in found)
        if not found:
            answer.say("nothing is running" if run is None else f"no run {run!r} is going on")


@click.command()
@click.argument("run")
@click.option("--kind", "kinds", default="kill", show_default=True, help=f"One or more of {', '.join(KINDS)}.")
@click.option("--every", "every_s", callback=_time, default="5s", show_default=True, help="Time between two acts.")
@click.option("--for", "for_s", callback=_time, default="60s", show_default=True, help="How long.")
@click.option("--seed", type=int, default=0, show_default=True, help="Decides what is done, and to what.")
@click.option("--yes-break-it", "agreed", is_flag=True, help="Without this, nothing is done.")
def chaos(run: str, kinds: str, every_s: float, for_s: float, seed: int, agreed: bool) -> None:
    """Kill, stop and corrupt parts of RUN, to see it recover.

    Only on the nodes of this machine. Prints everything it does, and why it chose that.
    """
    try:
        wanted = kinds_from(kinds)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if not agreed:
        click.echo(intention(run, wanted, every_s, for_s, seed), err=True)
        sys.exit(WRONG_USE)
    _break(run, wanted, every_s, for_s, random.Random(seed))


@click.command()
@click.option("--state", "state_bytes", callback=_size, help='Size of what is to be trained, such as "30GiB".')
@click.option("--sweep", is_flag=True, help="Remove what runs that are gone have left in the nodes' memory.")
@click.option("--directory", default="/dev/shm", show_default=True, help="As of Snapshot(directory=...).")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def doctor(state_bytes: int | None, sweep: bool, directory: str, as_json: bool) -> None:
    """Look at the cluster before a run: versions, memory, limits, clocks, ports; with advice.

    What SWEEP removes nobody will go on from: no process is left of it on the node, and its `linger_s` is over.
    STATE is what snapshots hold: parameters, optimizer and all else that is protected. Exits with 1 if something would
    keep a run from working.
    """
    with answering(as_json) as answer:
        from .doctor import judge
        from .doctor_cluster import visit
        from .status import attach

        attach()
        found = judge(visit(directory, sweep=sweep), state_bytes)
        answer.document["findings"] = [asdict(each) for each in found]
        answer.good = all(each.verdict != "bad" for each in found)
        answer.table(
            ("", "what", "found"),
            [({"good": "ok", "warning": "!", "bad": "!!"}[each.verdict], each.what, each.found) for each in found],
        )
        for each in found:
            if each.advice:
                answer.say(f"{each.what}: {each.advice}")


def intention(run: str, kinds: tuple[Kind, ...], every_s: float, for_s: float, seed: int) -> str:
    """What would be done."""
    acts = "\n".join(f"    {kind}: {KINDS[kind]}" for kind in kinds)
    return (
        f"Nothing was done. With --yes-break-it this does to the run {run!r}, on this machine's nodes, every "
        f"{every_s:g} s for {for_s:g} s (seed {seed}), one of\n{acts}"
    )


def _break(run: str, kinds: tuple[Kind, ...], every_s: float, for_s: float, source: random.Random) -> None:
    """Exits with 1 if nothing could be done at all."""
    from .chaos import Victim
    from .status import attach

    try:
        attach()
    except OSError as error:
        raise click.ClickException(str(error)) from error
    with Victim(run) as victim:
        done = disturb(victim, kinds, every_s, for_s, source)
    sys.exit(0 if done else FOUND_BAD)


def disturb(victim: Victim, kinds: tuple[Kind, ...], every_s: float, for_s: float, source: random.Random) -> int:
    """Prints every act. How many could be done."""
    from .chaos import NotNow

    done = 0
    for passed_s in _times(every_s, for_s):
        try:
            act = choose(victim.look(), kinds, source)
            if act is None:
                raise NotNow(f"there is nothing on this machine to do it to: {', '.join(kinds)}")
            what = victim.do(act)
            text, done = f"{act.kind}: {act.target}: {what} ({act.why})", done + 1
        except NotNow as why:
            text = f"nothing was done: {why}"
        click.echo(f"{time.strftime('%H:%M:%S')} {passed_s:6.1f} s  {text}")
    return done


def _times(every_s: float, for_s: float) -> Iterator[float]:
    """At once, and then at these intervals; seconds since the beginning."""
    began, due = time.monotonic(), 0.0
    while due <= for_s:
        time.sleep(max(0.0, began + due - time.monotonic()))
        yield time.monotonic() - began
        due += every_s
