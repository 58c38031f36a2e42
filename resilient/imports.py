"""Finds modules of the user's that would hide ours in the workers, before anything starts."""

from __future__ import annotations

import sys
from pathlib import Path

OURS = ("resilient", "actors", "snapshot")


def check_not_hidden(search: list[str] | None = None) -> None:
    """Raises ValueError naming the path and the remedy.

    Ray puts the script's folder in front of the workers' search path, so a module of one of our names
    there would be imported in place of ours.
    """
    home = Path(__file__).resolve().parent.parent
    for entry in sys.path if search is None else search:
        folder = Path(entry or ".").resolve()
        if folder == home:
            return
        for name in OURS:
            for hiding in (folder / f"{name}.py", folder / name / "__init__.py"):
                if hiding.is_file() and hiding.resolve().parent != home / name:
                    path = hiding if hiding.name != "__init__.py" else hiding.parent
                    raise ValueError(
                        f"{path} would hide the package `{name}` of resilient in the workers: "
                        "rename it, or run the script from another folder"
                    )
