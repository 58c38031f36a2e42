"""What the doctor says about a cluster: one line where all is well, and for each node where it is not."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from actors.folders import OWNER, Leftover, home, own
from resilient import doctor
from resilient.cli_output import in_byte_count
from resilient.doctor import PACKAGES, Cluster, Finding, NodeFacts, judge

WELL = NodeFacts(
    node="aaaaaaaaaaaa",
    host="one",
    python="3.11.7",
    versions=dict.fromkeys(PACKAGES, "1.0"),
    codec="isal",
    shared_bytes=64 << 30,
    shared_free_bytes=60 << 30,
    memory_bytes=128 << 30,
    object_store_bytes=8 << 30,
    open_files=65536,
)
OTHER = replace(WELL, node="bbbbbbbbbbbb", host="two")


def said(*nodes: NodeFacts, state_bytes: int | None = None, **settings: str) -> list[Finding]:
    return [each for each in judge(Cluster(nodes=nodes, settings=settings), state_bytes) if each.verdict != "good"]


def test_all_is_well() -> None:
    found = judge(Cluster(nodes=[WELL, OTHER]), 10 << 30)
    assert {each.verdict for each in found} == {"good"}
    assert len(found) == len({each.what for each in found}), "once for all nodes"


@pytest.mark.parametrize(
    ("change", "what", "verdict", "words"),
    [
        ({"python": "3.12.1"}, "Python", "bad", "3.11.7 and 3.12.1"),
        ({"versions": {**WELL.versions, "torch": ""}}, "torch", "bad", "not installed on bbbbbbbb"),
        ({"codec": "numpy"}, "parity", "warning", "slower than ISA-L"),
        ({"shared_bytes": 0}, "shared memory", "bad", "no /dev/shm"),
        ({"shared_bytes": 64 << 20, "shared_free_bytes": 64 << 20}, "shared memory", "warning", "64.0 MiB of"),
        ({"open_files": 1024}, "open files", "warning", "1024"),
        ({"ahead_s": -3.0}, "clocks", "warning", "3.0 s behind"),
        ({"reached_s": None, "unreachable": "timed out"}, "ports", "bad", "timed out"),
        ({"reached_s": 0.2}, "ports", "warning", "200 ms"),
    ],
)
def test_what_is_wrong_with_one_node_is_said_with_its_name(
    change: dict[str, object], what: str, verdict: str, words: str
) -> None:
    (found,) = said(WELL, replace(OTHER, **change))  # type: ignore[arg-type]
    assert (found.what, found.verdict) == (what, verdict)
    assert words in found.found and found.advice
    assert what in ("Python", "torch") or "bbbbbbbb" in found.found


def test_whether_a_state_has_room() -> None:
    (one, other) = said(WELL, OTHER, state_bytes=100 << 30)
    assert one.verdict == "bad" and "need about 350.0 GiB here" in one.found and "shm-size" in one.advice
    assert "node bbbbbbbb" in other.found
    assert not said(*[replace(WELL, node=str(number)) for number in range(32)], state_bytes=100 << 30)


def test_hasty_health_checks_are_warned_of() -> None:
    assert not said(WELL, RAY_health_check_timeout_ms="10000")
    (found,) = said(WELL, RAY_health_check_timeout_ms="200", RAY_health_check_period_ms="100")
    assert found.what == "health checks" and "RAY_health_check_timeout_ms below 1000 ms" in found.advice


def left(name: str, ended_s: float, lingers_s: float) -> Leftover:
    return Leftover(folder=Path("/dev/shm/resilient") / name, nbytes=3 << 20, ended_s=ended_s, lingers_s=lingers_s)


def test_what_runs_that_are_gone_have_left_in_memory_is_listed() -> None:
    (found,) = said(WELL, replace(OTHER, left=[left("a-1-x", 9, 8), left("b-2-x", 9, 8), left("c-1-x", 1, 61)]))
    assert found.found == (
        "node bbbbbbbb: a-1-x, b-2-x (6.0 MiB) of runs that are gone; "
        "c-1-x (3.0 MiB) kept for 60 s more, for the run to be submitted again"
    )
    assert "resilient doctor --sweep" in found.advice
    assert not said(replace(WELL, left=[left("c-1-x", 1, 61)])), "it may still be wanted"


def test_it_is_swept_when_asked(tmp_path: Path) -> None:
    folder = home(str(tmp_path)) / "gpt-1-aaaa"
    own(folder, 5.0)
    (folder / "slot").write_bytes(bytes(1 << 20))
    (folder / OWNER).write_text("1 0")
    os.utime(folder / OWNER, (0, 0))
    (found,) = doctor.facts("me", 0, str(tmp_path)).left
    assert found.folder == folder and 1 << 20 <= found.nbytes < 2 << 20 and found.lingers_s == 5.0
    seen = doctor.facts("me", 0, str(tmp_path), sweep=True)
    assert not folder.exists() and not seen.left
    (said,) = [each.found for each in judge(Cluster(nodes=[seen])) if each.what == "left in memory"]
    assert said == "nothing of runs that are gone; gpt-1-aaaa (1.0 MiB) removed"


def test_this_machine_can_be_looked_at() -> None:
    found = doctor.facts("me", 0)
    assert found.versions["torch"] and found.memory_bytes > 0 and found.codec in ("isal", "numpy")


def test_sizes() -> None:
    sizes = {"512": 512, "500MiB": 500 << 20, "30GB": 30_000_000_000, "1.5 GiB": 3 << 29, "7 b": 7}
    assert {size: in_byte_count(size) for size in sizes} == sizes
    assert in_byte_count("much") is None and in_byte_count("3 XB") is None
