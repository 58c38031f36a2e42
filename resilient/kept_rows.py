"""Rows of metrics in a file of each attempt, for the attempts that go on from it.

    DIR/RUN/ATTEMPT/metrics.jsonl    {"origin": "s3://bucket/gpt"}
                                     {"from": 1, "before": 500}      the rows of attempt 1 up to there come first
                                     {"step": 500.0, "loss": 0.25}   of rows of the same step the last one counts

origin says what connects attempts, the checkpoints' URL or the cluster: another run's file counts for nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from .journal import Journal

ROWS = "metrics.jsonl"

Row = dict[str, float]


class KeptRows:
    """Those of one attempt. Raises OSError if there can be none."""

    def __init__(self, folder: Path, attempt: int, origin: str, *, anew: bool) -> None:
        """folder: the run's. anew: what is in the attempt's file is another run's."""
        self._folder, self._origin = folder, origin
        path = folder / str(attempt) / ROWS
        if anew:
            path.unlink(missing_ok=True)
        self._file = Journal(path)
        self._file.add({"origin": origin})

    def add(self, rows: Iterable[Row]) -> None:
        for row in rows:
            self._file.add(row, allow_nan=True)

    def go_on_from(self, attempt: int, before: int) -> Callable[[], list[Row]]:
        """This attempt begins at step `before` of that one. Reads the rows up to there, as far as they were kept."""
        self._file.add({"from": attempt, "before": before})
        return partial(self._read, attempt, before)

    def close(self) -> None:
        self._file.close()

    def _read(self, attempt: int, before: int) -> list[Row]:
        rows: dict[float, Row] = {}
        try:
            lines = (self._folder / str(attempt) / ROWS).read_text().splitlines()
        except OSError:
            return []
        for line in lines:
            record = _record(line)
            if record.get("origin", self._origin) != self._origin:
                return []
            if record.get("from", attempt) < attempt:
                rows = {row["step"]: row for row in self._read(record["from"], record["before"])}
            elif "step" in record:
                rows[record["step"]] = record
        return [rows[step] for step in sorted(rows) if step < before]


def _record(line: str) -> dict[str, Any]:
    """Empty for a line that was cut off."""
    try:
        record = json.loads(line)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}
