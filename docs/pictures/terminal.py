"""The picture of `resilient watch` in the README: what it shows of a run on this machine, as the controller wrote that
down last. A document of `resilient report RUN --json` will do as well.

    python docs/pictures/terminal.py RUN_OR_DOCUMENT docs/pictures/terminal.svg

page.png is the file that `resilient report RUN` makes of the same, in a browser 1280 wide.
"""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

from rich.console import Console

from resilient.report import kept
from resilient.watch import drawn

WIDTH = 118


def main(run: str, out: str) -> None:
    document = json.loads(Path(run).read_text()) if run.endswith(".json") else kept(run)
    console = Console(file=io.StringIO(), width=WIDTH, record=True)
    console.print(drawn(document, WIDTH))
    picture = console.export_svg(title=f"resilient watch {document['now']['run']}")
    Path(out).write_text(re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL))  # no fonts from elsewhere


if __name__ == "__main__":
    main(*sys.argv[1:])
