"""`resilient dashboards`: rules, a dashboard and manifests for whoever watches runs."""

from __future__ import annotations

from pathlib import Path

import click

from .cli_output import answering


@click.group("dashboards")
def dashboards_group() -> None:
    """What Prometheus and Grafana need to watch runs."""


@dashboards_group.command("export")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path, file_okay=False))
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def export_command(folder: Path, as_json: bool) -> None:
    """Write rules, a dashboard, scrape configuration, docker compose and Kubernetes manifests into DIR.

    Replaces what an earlier export has left there.
    """
    with answering(as_json) as answer:
        from .dashboards.export import export

        written = [str(path) for path in export(folder)]
        answer.document = {"folder": str(folder), "files": written}
        for path in written:
            answer.say(path)
