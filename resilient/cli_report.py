"""`resilient watch` and `report`: a run in a terminal, and as one file."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from .cli_output import FOUND_BAD, answering


@click.command()
@click.argument("run")
@click.option("-o", "--out", type=click.Path(path_type=Path, dir_okay=False), help="RUN.html, if not given.")
@click.option("--attempt", type=int, help="The last one, if not given.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document, of all that the report shows.")
def report(run: str, out: Path | None, attempt: int | None, as_json: bool) -> None:
    """Write what is known of RUN into one HTML file: losses, recoveries, where the time went, what happened.

    To be called on the node with the cluster's head, while the run goes on or after it; no cluster is needed. The file
    needs nothing else, and asks nobody for anything.
    """
    with answering(as_json) as answer:
        from .report import kept, write

        document = kept(run, attempt)
        answer.document.update(document)
        if not as_json or out is not None:
            path = out if out is not None else Path(f"{run}.html")
            write(document, path)
            now = document["now"]
            answer.say(f"{path}: {run}, attempt {now['attempt']}, {now['step']} steps, {now['state']}")


@click.command()
@click.argument("run")
def watch(run: str) -> None:
    """Watch RUN in this terminal until it ends: state, losses, ranks, recoveries, what happens.

    Exits with 1 if it is not going on.
    """
    from rich.console import Console

    from .status import attach, shown
    from .watch import watch as watching

    try:
        attach()
    except OSError as error:
        raise click.ClickException(str(error)) from error
    if not watching(lambda: shown(run), Console()):
        click.echo(f"no run {run!r} is going on", err=True)
        sys.exit(FOUND_BAD)
