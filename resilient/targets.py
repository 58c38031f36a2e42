"""Where a run can be scraped, for Prometheus to find: a file for its file_sd_configs, there as long as it is served.

    DIR/targets/RUN-ATTEMPT.json    [{"targets": ["10.0.0.7:43210"], "labels": {"__meta_resilient_run": "gpt", ...}}]

Prometheus may be another user's, so these may be read by all; a run's folder, DIR/RUN, only by this one.
DIR is what RESILIENT_DIR says on the controller's node, or /tmp/resilient-runs, or where that is another user's,
/tmp/resilient-runs-UID.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
from pathlib import Path

VARIABLE = "RESILIENT_DIR"
DEFAULT = "/tmp/resilient-runs"
"""A name that no import can have: a script in /tmp would import /tmp/resilient in place of the package."""


def own_folder() -> Path:
    """DIR, which is there then. Raises OSError if it can't be had, or if it is not safe to write there."""
    named = os.environ.get(VARIABLE)
    if named:
        Path(named).mkdir(parents=True, exist_ok=True)
        return Path(named)
    candidates = (Path(DEFAULT), Path(f"{DEFAULT}-{os.geteuid()}"))
    for folder in candidates:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(0o755)
        if _is_ours(folder.lstat()):
            return folder
    raise PermissionError(
        f"neither {candidates[0]} nor {candidates[1]} is a folder that belongs to this user alone: set {VARIABLE} to "
        "another folder on this node"
    )


def _is_ours(found: os.stat_result) -> bool:
    """Anybody may create it under /tmp, and could have us write to files of ours elsewhere."""
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022


def run_folder(run: str) -> Path:
    """The run's, for this user alone. Raises OSError as `own_folder` does."""
    folder = own_folder() / run
    folder.mkdir(mode=0o700, exist_ok=True)
    if stat.S_IMODE(folder.lstat().st_mode) & 0o077:  # of an older version
        folder.chmod(0o700)
    return folder


class Target:
    """One run's file."""

    def __init__(self, folder: Path, run: str, attempt: int) -> None:
        self._folder, self._run, self._attempt = folder / "targets", run, attempt
        self.path = self._folder / f"{run}-{attempt}.json"

    def show(self, address: str) -> None:
        """address: host:port. What earlier attempts have left behind is removed: they are over. Raises OSError."""
        labels = {"__meta_resilient_run": self._run, "__meta_resilient_attempt": str(self._attempt)}
        self._folder.mkdir(exist_ok=True)
        for name in os.listdir(self._folder):
            attempt = re.fullmatch(rf"{re.escape(self._run)}-(\d+)\.json", name)
            if attempt is not None and int(attempt[1]) < self._attempt:
                (self._folder / name).unlink(missing_ok=True)
        fresh = self._folder / f".{self.path.name}.new"
        fresh.write_text(json.dumps([{"targets": [address], "labels": labels}]) + "\n")
        fresh.replace(self.path)

    def remove(self) -> None:
        """Raises OSError."""
        self.path.unlink(missing_ok=True)
