"""A run as one file that needs nothing else: the live page, with all that it would have been sent in it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from .targets import own_folder

KEPT = "run.json"
"""Beside a run's events: how it stood last, and its history."""
MODULES = ("drawing.js", "parts.js", "page.js")
"""In the order in which they need each other."""


def kept(run: str, attempt: int | None = None) -> dict[str, Any]:
    """What the controller has left of a run on this machine; of its last attempt, if none is named.

    Raises FileNotFoundError, which names the runs that there are.
    """
    folder = own_folder()
    attempts = sorted(int(each.parent.name) for each in folder.glob(f"{run}/*/{KEPT}") if each.parent.name.isdigit())
    if not attempts or (attempt is not None and attempt not in attempts):
        there = sorted({each.parent.parent.name for each in folder.glob(f"*/*/{KEPT}")})
        what = f"run {run!r}" if not attempts else f"attempt {attempt} of run {run!r} (there are {attempts})"
        raise FileNotFoundError(
            f"nothing is kept of {what} in {folder} on this machine; there is something of "
            f"{', '.join(there) or 'no run'}. Runs leave it on the node with the cluster's head"
        )
    path = folder / run / str(attempts[-1] if attempt is None else attempt) / KEPT
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def as_html(document: Mapping[str, Any]) -> str:
    """document: as `kept` returns it."""
    page = files("resilient") / "page"
    text = (page / "index.html").read_text()
    script = "\n".join(_plain((page / name).read_text()) for name in MODULES)
    content = json.dumps(document, allow_nan=False).replace("<", "\\u003c")
    for pattern, then in (
        (r'\s*<link rel="icon"[^>]*>', ""),
        (r'<link rel="stylesheet"[^>]*>', f"<style>\n{(page / 'page.css').read_text()}</style>"),
        (r'\s*<script type="module"[^>]*></script>', ""),
        (r"(?s)\s*<a href=.*?</a>", ""),
        (r"(?s)<noscript>.*?</noscript>", "<noscript>This page needs JavaScript.</noscript>"),
        (
            r"</body>",
            f'  <script type="application/json" id="kept">{content}</script>\n'
            f'    <script type="module">\n{script}</script>\n  </body>',
        ),
    ):
        text, count = re.subn(pattern, lambda _, then=then: then, text)  # type: ignore[misc]
        assert count, pattern
    return text


def write(document: Mapping[str, Any], out: Path) -> None:
    """Raises OSError."""
    out.write_text(as_html(document))


def _plain(module: str) -> str:
    """Without imports and exports: all modules are one."""
    lines = [line for line in module.splitlines() if not line.startswith("import ")]
    return "\n".join(line.removeprefix("export ") for line in lines)
