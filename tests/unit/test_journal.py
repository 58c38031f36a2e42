"""events.jsonl: every line whole, nobody waits for it, and what it lacks is counted."""

from __future__ import annotations

import json
import os
import stat
import threading
from pathlib import Path

import pytest

from resilient import journal
from resilient.journal import Journal, remembered


def test_lines_are_written_in_order_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "run" / "1" / "events.jsonl"
    lines = Journal(path)
    for number in range(100):
        lines.add({"kind": "node seen", "number": number})
    lines.close()
    assert [json.loads(line)["number"] for line in path.read_text().splitlines()] == list(range(100))
    assert [record["number"] for record in remembered(path)] == list(range(100))
    assert lines.left_out == 0


def test_a_line_that_was_cut_off_does_not_spoil_the_next(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"kind": "run began"}\n{"kind": "node s')
    lines = Journal(path)
    lines.add({"kind": "controller restarted"})
    lines.close()
    assert [record["kind"] for record in remembered(path)] == ["run began", "controller restarted"]


def test_of_a_long_file_the_end_is_remembered(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text("".join(json.dumps({"kind": "node seen", "number": n, "x": "y" * 990}) + "\n" for n in range(3000)))
    found = remembered(path)
    assert 900 < len(found) < 1100 and found[-1]["number"] == 2999
    assert remembered(tmp_path / "none") == []


def test_what_a_full_disk_does_not_take_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = Journal(tmp_path / "events.jsonl")

    def full(descriptor: int, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(journal.os, "write", full)
    for _ in range(3):
        lines.add({"kind": "node seen"})
    lines.close()
    assert lines.left_out == 3


def test_nobody_waits_for_a_disk_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "MOST_WAITING", 10)
    lines = Journal(tmp_path / "events.jsonl")
    hangs, write, writing = threading.Event(), os.write, threading.Event()

    def hanging(descriptor: int, content: bytes) -> int:
        writing.set()
        hangs.wait(30.0)
        return write(descriptor, content)

    monkeypatch.setattr(journal.os, "write", hanging)
    lines.add({"kind": "node seen"})
    assert writing.wait(30.0)
    for _ in range(15):
        lines.add({"kind": "node seen"})
    assert lines.left_out == 5
    hangs.set()
    lines.close()
    assert len(remembered(tmp_path / "events.jsonl")) == 11


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match="symbolic links"):
        Journal(tmp_path / "events.jsonl")


def test_only_this_user_may_read_it(tmp_path: Path) -> None:
    """Tracebacks of users may hold secrets."""
    path = tmp_path / "gpt" / "1" / "events.jsonl"
    path.parent.mkdir(parents=True)
    path.touch(mode=0o644)  # of an older version
    for each in (path, tmp_path / "other" / "1" / "events.jsonl"):
        Journal(each).close()
        assert stat.S_IMODE(each.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "other" / "1").stat().st_mode) == 0o700
