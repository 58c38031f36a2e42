"""Rows of metrics outlive their attempt."""

from __future__ import annotations

import math
from pathlib import Path

from resilient.kept_rows import ROWS, KeptRows
from resilient.records import Records, StepValues


def rows(*steps: int, loss: float = 1.0) -> list[dict[str, float]]:
    return [{"step": float(step), "loss": loss, "rate": 0.5} for step in steps]


def attempt(folder: Path, number: int, kept: list[dict[str, float]], origin: str = "s3://b", **more: int) -> KeptRows:
    """One that has ended. more: the attempt and step that it has gone on from."""
    found = KeptRows(folder, number, origin, anew=True)
    if more:
        found.go_on_from(more["attempt"], more["before"])
    found.add(kept)
    found.close()
    return found


def test_an_attempt_has_the_rows_of_all_before_it(tmp_path: Path) -> None:
    attempt(tmp_path, 1, rows(0, 1, 2, 3))
    attempt(tmp_path, 2, rows(2, 3, 4, loss=2.0), attempt=1, before=2)
    attempt(tmp_path, 4, [], attempt=2, before=5)
    third = KeptRows(tmp_path, 5, "s3://b", anew=True)
    assert third.go_on_from(4, 5)() == [*rows(0, 1), *rows(2, 3, 4, loss=2.0)]
    assert third.go_on_from(4, 1)() == rows(0)
    assert third.go_on_from(3, 5)() == [], "it has kept nothing"
    third.close()


def test_after_a_rollback_the_later_row_counts(tmp_path: Path) -> None:
    first = attempt(tmp_path, 1, [*rows(0, 1, 2), *rows(1, 2, loss=math.inf)])
    assert first._read(1, 3) == [*rows(0), *rows(1, 2, loss=math.inf)]


def test_another_runs_rows_count_for_nothing(tmp_path: Path) -> None:
    attempt(tmp_path, 1, rows(0, 1), origin="s3://other")
    second = KeptRows(tmp_path, 2, "s3://b", anew=True)
    assert second.go_on_from(1, 2)() == []
    second.close()
    attempt(tmp_path, 1, rows(5))
    assert second._read(1, 9) == rows(5), "those of another cluster's run of this name are gone"


def test_a_torn_line_is_passed_over(tmp_path: Path) -> None:
    first = attempt(tmp_path, 1, rows(0, 1))
    with (tmp_path / "1" / ROWS).open("a") as file:
        file.write('{"step": 2.0, "lo')
    assert first._read(1, 9) == rows(0, 1)
    again = KeptRows(tmp_path, 1, "s3://b", anew=False)
    again.add(rows(2))
    again.close()
    assert first._read(1, 9) == rows(0, 1, 2)


def test_a_finished_run_that_is_submitted_again_has_them() -> None:
    records = Records()
    records.rewind(1, 3, 0, anew=True, former=lambda: rows(0, 1, 2))
    assert records.after(-1, all_of_them=False) == []
    assert records.after(-1, all_of_them=True) == rows(0, 1, 2)
    assert records.after(2, all_of_them=True) == []


def test_one_that_goes_on_has_its_own() -> None:
    records = Records()
    records.rewind(1, 3, 0, anew=True, former=lambda: rows(0, 1, 2))
    for step in range(3, 6):
        records.add(StepValues(step=step, losses=(2.0,), values={}))
    assert [row["step"] for row in records.after(-1, all_of_them=True)] == [3.0, 4.0, 5.0]
