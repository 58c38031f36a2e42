"""The command `resilient`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from .cli_check import check
from .cli_checkpoints import checkpoints_group
from .cli_cluster import chaos, doctor, drain, status
from .cli_dashboards import dashboards_group
from .cli_output import end_in_order
from .cli_report import report, watch


@click.group()
@click.version_option(package_name="resilient-runtime")
def main() -> None:
    """A fault-tolerant training runtime for PyTorch on Ray."""


@main.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("out/demo"), show_default=True)
@click.option("--steps", type=int, default=140, show_default=True, help="Steps to train.")
@click.option("--seed", type=int, default=0, show_default=True, help="Decides who is hit, and when within a step.")
@click.option("--pipeline", is_flag=True, help="Spread the model's layers over the ranks.")
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON; progress goes to stderr.")
def demo(out: Path, steps: int, seed: int, pipeline: bool, as_json: bool) -> None:
    """Train through a killed rank, a lost node and a new node, and compare the bits.

    Takes about two minutes, on the CPU only. Exits with 1 unless the bits are the same as in one
    undisturbed process, and everything that was planned has happened.
    """
    from rich.console import Console

    from .demo import run_demo, show
    from .demo_screen import Screen
    from .errors import ResilientError

    end_in_order()
    try:
        with Screen(Console(file=sys.stderr if as_json else sys.stdout), steps) as screen:
            outcome = run_demo(out=out, steps=steps, seed=seed, screen=screen, pipeline=pipeline)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    except ResilientError as error:
        raise click.ClickException(f"{type(error).__name__}: {error}") from error
    show(outcome, out, screen)
    if as_json:
        print(json.dumps(outcome.to_json()))
    sys.exit(0 if outcome.passed else 1)


main.add_command(check)
main.add_command(checkpoints_group)
main.add_command(status)
main.add_command(drain)
main.add_command(chaos)
main.add_command(doctor)
main.add_command(dashboards_group)
main.add_command(report)
main.add_command(watch)
