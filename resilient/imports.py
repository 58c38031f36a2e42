"""Finds modules of the user's that would hide ours in the workers, before anything starts."""

from __future__ import annotations

import importlib
import os
import sys
from importlib.machinery import PathFinder
from pathlib import Path

OURS = ("resilient", "actors", "snapshot")
HOME = Path(__file__).resolve().parent.parent


def check_not_hidden(search: list[str] | None = None) -> None:
    """Raises ValueError naming the path and the remedy.

    Ray puts the current folder and the script's in front of the workers' search path, so a module of one
    of our names there would be imported in place of ours. Python itself is asked what it would find: a
    folder without __init__.py gives way to a package anywhere later on the path, but it does hide one
    that is not on the path at all, as after an editable installation.
    """
    importlib.invalidate_caches()
    folders = [os.getcwd(), *sys.path] if search is None else search
    for name in OURS:
        spec = PathFinder.find_spec(name, folders)
        if spec is None:
            continue
        places = list(spec.submodule_search_locations or ())
        found = Path(places[0] if places else spec.origin or name)
        if found.resolve() != HOME / name:
            raise ValueError(
                f"{found} would hide the package `{name}` of resilient in the workers: "
                "rename it, or run the script from another folder"
            )
