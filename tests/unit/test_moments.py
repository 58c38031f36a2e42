"""How long ago something was, however the clocks are set meanwhile."""

from __future__ import annotations

import time

import pytest

from actors import moments
from actors.moments import boot_s, moment, since_s, since_stamp_s


def set_clock(monkeypatch: pytest.MonkeyPatch, by_s: float) -> None:
    now = time.time
    monkeypatch.setattr(moments.time, "time", lambda: now() + by_s)


@pytest.mark.parametrize("by_s", [-900.0, 0.0, 900.0])
def test_on_one_host_a_clock_that_is_set_changes_nothing(monkeypatch: pytest.MonkeyPatch, by_s: float) -> None:
    then = moment()
    then["boot_s"] -= 30.0
    set_clock(monkeypatch, by_s)
    assert 30.0 <= since_s(then) < 60.0
    assert 30.0 <= since_stamp_s(boot_s() - 30.0) < 60.0


def test_from_another_host_the_wall_clock_is_all_there_is() -> None:
    then = {**moment(), "boot": "another", "boot_s": 0.0}
    then["at"] -= 30.0
    assert 30.0 <= since_s(then) < 60.0
    then["at"] += 300.0
    assert since_s(then) == 0.0


def test_what_older_versions_have_left_is_read() -> None:
    assert 30.0 <= since_s({"at": time.time() - 30.0}) < 60.0
    assert 30.0 <= since_stamp_s(time.time() - 30.0) < 60.0
