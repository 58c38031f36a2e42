"""`resilient check`: a script's first steps in every layout that failures may bring, on this machine."""

from __future__ import annotations

import contextlib
import json
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import click

from .api import TrainFunction
from .cli_output import answering, end_in_order

MODULE = "__checked__"
"""What the script is called while it is imported. Not __main__: its main block must not run."""


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("script", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.argument("script_args", nargs=-1, type=click.UNPROCESSED)
@click.option("--function", "name", help="Which one, if the script has several under @resilient.train.")
@click.option("--args", "arguments", default="{}", help="Its keyword arguments, as JSON: '{\"lr\": 0.1}'.")
@click.option("--steps", type=int, default=6, show_default=True, help="How many of the first steps.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document; progress goes to stderr.")
def check(
    script: Path, script_args: tuple[str, ...], name: str | None, arguments: str, steps: int, as_json: bool
) -> None:
    """Train the first steps of SCRIPT in one process, on several ranks, with a death, and with a stop and a resume.

    The bits of the state are compared after each step. Takes less than a minute for a small model, on the CPU, without
    Ray. What stands after -- is the script's own: sys.argv. Exits with 1 if anything differs.
    """
    end_in_order()
    with answering(as_json) as answer:
        from .check import Check

        function = _function(_imported(script, script_args), script, name)
        packed = function.packed((), _keywords(arguments))
        report = Check(function.settings, packed, steps, lambda text: click.echo(text, err=True)).run()
        answer.document, answer.good = report.to_json(), report.passed
        answer.say(str(report))


def _imported(script: Path, script_args: tuple[str, ...]) -> Any:
    """The script as a module, found by those that unpickle its functions in other processes."""
    from ray import cloudpickle

    sys.argv = [str(script), *script_args]
    sys.path.insert(0, str(script.resolve().parent))
    spec = spec_from_file_location(MODULE, script)
    if spec is None or spec.loader is None:
        raise ValueError(f"{script} is no Python file")
    module = module_from_spec(spec)
    sys.modules[MODULE] = module
    try:
        with contextlib.redirect_stdout(sys.stderr):
            spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{script} raises when it is imported: {type(error).__name__}: {error}") from error
    cloudpickle.register_pickle_by_value(module)
    return module


def _function(module: Any, script: Path, name: str | None) -> TrainFunction:
    found = {key: value for key, value in vars(module).items() if isinstance(value, TrainFunction)}
    if name is not None and name not in found:
        raise ValueError(f"--function {name}: {script} has {_listed(found)}")
    if name is None and len(found) != 1:
        raise ValueError(f"{script} has {_listed(found)}; choose one with --function NAME" if found else _none(script))
    return found[name] if name is not None else next(iter(found.values()))


def _none(script: Path) -> str:
    return f"{script} has no function under @resilient.train at its top level"


def _listed(found: dict[str, TrainFunction]) -> str:
    return f"these functions under @resilient.train: {', '.join(sorted(found)) or 'none'}"


def _keywords(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--args {text!r}: is JSON, such as '{{\"lr\": 0.1}}': {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"--args {text!r}: is a JSON object of keyword arguments, such as '{{\"lr\": 0.1}}'")
    return found
